"""Who is where: rank ↔ (pp, dp, tp), as pure arithmetic for any rank of any world.

    rank = (pp · DP + dp) · TP + tp

Tensor ranks are innermost: they talk most (every layer) and belong on one node. Pipeline ranks are outermost: they
talk least (one activation per microbatch) and bear the slow links. world/mesh.py makes the live groups from this.
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
    """The sizes of the three axes. A single process is Layout(1, 1, 1)."""

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        assert min(self.dp, self.pp, self.tp) >= 1, self

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    def place(self, rank: int) -> Place:
        assert 0 <= rank < self.world_size, (rank, self)
        rank, tp = divmod(rank, self.tp)
        pp, dp = divmod(rank, self.dp)
        return Place(pp, dp, tp)

    def rank(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def along(self, axis: AxisName, place: Place) -> list[int]:
        """The ranks that differ from `place` in this axis alone, in the order of their coordinate."""
        return [self.rank(**{**place._asdict(), axis: i}) for i in range(getattr(self, axis))]

    def groups(self, axis: AxisName) -> list[list[int]]:
        """Every group of this axis: a partition of the world, in an order that all ranks share."""
        places = map(self.place, range(self.world_size))
        return [self.along(axis, place) for place in places if getattr(place, axis) == 0]

    def model_groups(self) -> list[list[int]]:
        """The ranks that hold one replica of the model together (pp × tp), one group per data rank."""
        return [[self.rank(pp, dp, tp) for pp in range(self.pp) for tp in range(self.tp)] for dp in range(self.dp)]

    def __str__(self) -> str:
        return f"TP{self.tp}×PP{self.pp}×DP{self.dp}"
