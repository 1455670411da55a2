"""The layout of a world: rank ↔ (pp, dp, cp, tp), as pure arithmetic for any rank of any world.

    rank = ((pp · DP + dp) · CP + cp) · TP + tp

Tensor ranks are innermost: they communicate most (several times in every layer) and belong on one node. Context ranks
come next (once in every layer), then data ranks (once in a step). Pipeline ranks are outermost: they communicate least
(one activation per microbatch) and tolerate slow links. world/mesh.py creates the process groups.

The same dp × cp ranks are also EDP groups of EP: dp · CP + cp = edp · EP + ep. Ranks of one group hold different
experts of the same layers, and send each other tokens; ranks with the same ep hold the same experts. In the same way
ZeRO may cut over groups of neighbours alone: dp · CP + cp = replica · SHARD + shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

AxisName = Literal["pp", "dp", "cp", "tp", "dp_cp", "ep", "edp", "shard", "replica"]
"""A dimension of the layout, or two of them together: dp_cp, the ranks that hold the same parameters; or what these are
for experts: ep, that hold different ones, and edp, that hold the same; or for ZeRO: shard, that hold different shards,
and replica, that hold the same."""


class Coordinates(NamedTuple):
    """Coordinates of one rank."""

    pp: int
    dp: int
    tp: int
    cp: int = 0

    def __str__(self) -> str:
        """The context rank is told where it is not 0, which it always is without context parallelism."""
        return " ".join([f"pp{self.pp}", f"dp{self.dp}", *([f"cp{self.cp}"] if self.cp else []), f"tp{self.tp}"])


@dataclass(frozen=True)
class Layout:
    """Sizes of the four axes, and into how many parts dp × cp cuts the experts, and ZeRO cuts its shards. A single
    process is Layout()."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    zero_ranks: int | None = None
    """Ranks of dp × cp that hold different shards; None if all do."""

    def __post_init__(self) -> None:
        assert min(self.dp, self.pp, self.tp, self.cp, self.ep) >= 1 and self.dp_cp % self.ep == 0, self
        assert self.dp_cp % self.shard == 0, self

    @property
    def world_size(self) -> int:
        return self.dp_cp * self.pp * self.tp

    @property
    def dp_cp(self) -> int:
        """Ranks that hold the same parameters: their gradients are summed, and ZeRO shards over them."""
        return self.dp * self.cp

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp_cp // self.ep

    @property
    def shard(self) -> int:
        """Ranks over which ZeRO cuts what they hold."""
        return self.dp_cp if self.zero_ranks is None else self.zero_ranks

    @property
    def replica(self) -> int:
        """Ranks that hold the same shards."""
        return self.dp_cp // self.shard

    def shards(self, of_expert: bool) -> int:
        """Ranks over which ZeRO cuts parameters, of experts or others: experts that are cut over ranks are cut over all
        that hold the same ones."""
        return self.edp if of_expert and self.ep > 1 else self.shard

    def place(self, rank: int) -> Coordinates:
        """Coordinates of a rank."""
        assert 0 <= rank < self.world_size, (rank, self)
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, dp = divmod(rank, self.dp)
        return Coordinates(pp, dp, tp, cp)

    def rank(self, pp: int, dp: int, tp: int, cp: int = 0) -> int:
        """Rank at the given coordinates."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def stride(self, axis: AxisName) -> int:
        """Difference of the ranks of two neighbours on this axis."""
        if axis == "replica":
            return self.shard * self.tp
        inner = self.cp * self.tp
        of_parts = {"ep": self.tp, "edp": self.ep * self.tp, "shard": self.tp}
        return {"tp": 1, "cp": self.tp, "dp_cp": self.tp, "dp": inner, "pp": self.dp * inner, **of_parts}[axis]

    def along(self, axis: AxisName, place: Coordinates) -> list[int]:
        """Ranks that differ from `place` only in this axis, in the order of their coordinate."""
        rank, stride = self.rank(**place._asdict()), self.stride(axis)
        return self._group(axis, rank - rank // stride % self._size(axis) * stride)

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
        """One group per rank of dp_cp: the ranks (pp × tp) that together hold one replica of the model."""
        return [
            [
                rank
                for first in range(replica * self.tp, self.world_size, self.stride("pp"))
                for rank in range(first, first + self.tp)
            ]
            for replica in range(self.dp_cp)
        ]

    def _size(self, axis: AxisName) -> int:
        size: int = getattr(self, axis)
        return size

    def _group(self, axis: AxisName, first: int) -> list[int]:
        """The group of the rank whose coordinate on this axis is 0."""
        stride = self.stride(axis)
        return list(range(first, first + stride * self._size(axis), stride))

    def __str__(self) -> str:
        context = f"CP{self.cp}×" if self.cp > 1 else ""
        experts = f" EP{self.ep}" if self.ep > 1 else ""
        return f"TP{self.tp}×{context}PP{self.pp}×DP{self.dp}{experts}"
