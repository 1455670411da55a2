"""The layout of a world: rank ↔ (pp, dp, tp), as pure arithmetic for any rank of any world.

    rank = (pp · DP + dp) · TP + tp

Tensor ranks are innermost: they communicate most (in every layer) and belong on one node. Pipeline ranks are outermost:
they communicate least (one activation per microbatch) and tolerate slow links. world/mesh.py creates the process
groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

AxisName = Literal["pp", "dp", "tp"]


class Place(NamedTuple):
    """Coordinates of one rank."""

    pp: int
    dp: int
    tp: int

    def __str__(self) -> str:
        return f"pp{self.pp} dp{self.dp} tp{self.tp}"


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes. A single process is Layout(1, 1, 1)."""

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        assert min(self.dp, self.pp, self.tp) >= 1, self

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    def place(self, rank: int) -> Place:
        """Coordinates of a rank."""
        assert 0 <= rank < self.world_size, (rank, self)
        rank, tp = divmod(rank, self.tp)
        pp, dp = divmod(rank, self.dp)
        return Place(pp, dp, tp)

    def rank(self, pp: int, dp: int, tp: int) -> int:
        """Rank at the given coordinates."""
        return (pp * self.dp + dp) * self.tp + tp

    def stride(self, axis: AxisName) -> int:
        """Difference of the ranks of two neighbours on this axis."""
        return {"tp": 1, "dp": self.tp, "pp": self.dp * self.tp}[axis]

    def along(self, axis: AxisName, place: Place) -> list[int]:
        """Ranks that differ from `place` only in this axis, in the order of their coordinate."""
        return self._group(axis, self.rank(**{**place._asdict(), axis: 0}))

    def groups(self, axis: AxisName) -> list[list[int]]:
        """All groups of this axis: a partition of the world, in the same order on every rank."""
        stride = self.stride(axis)
        firsts = (
            first
            for block in range(0, self.world_size, stride * self._size(axis))
            for first in range(block, block + stride)
        )
        return [self._group(axis, first) for first in firsts]

    def model_groups(self) -> list[list[int]]:
        """One group per data rank: the ranks (pp × tp) that together hold one replica of the model."""
        return [
            [
                rank
                for first in range(dp * self.tp, self.world_size, self.stride("pp"))
                for rank in range(first, first + self.tp)
            ]
            for dp in range(self.dp)
        ]

    def _size(self, axis: AxisName) -> int:
        return {"tp": self.tp, "dp": self.dp, "pp": self.pp}[axis]

    def _group(self, axis: AxisName, first: int) -> list[int]:
        """The group of the rank whose coordinate on this axis is 0."""
        stride = self.stride(axis)
        return list(range(first, first + stride * self._size(axis), stride))

    def __str__(self) -> str:
        return f"TP{self.tp}×PP{self.pp}×DP{self.dp}"
