"""The section `parallel` of the config: the axes of the world, and how each is used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from roots_dist.config.extensions import or_extended
from roots_dist.config.section import Section
from roots_dist.schedule.schedules import DEFAULT, SCHEDULES

if TYPE_CHECKING:
    ScheduleName = str
else:  # a name added to a table is a value of the key
    ScheduleName = Literal[tuple(SCHEDULES)]

CpKind = Literal["gather", "heads"]


class ParallelConfig(Section):
    """The layout of the world: world = tp × cp × pp × dp. dp is what is left over, so it is not a key. ep is a part of
    dp × cp."""

    tp: int = Field(1, ge=1, description="tensor-parallel ranks: heads, MLP columns and vocabulary are cut over them")
    cp: int = Field(
        1,
        ge=1,
        description="context-parallel ranks: positions are cut over them, and brought together in attention",
    )
    cp_kind: CpKind = Field(
        "gather",
        description="how: gather (each rank gathers all keys and values) or heads (each rank has all positions of some "
        "heads, which tp × cp must divide)",
    )
    ep: int = Field(
        1,
        ge=1,
        description="expert-parallel ranks, of dp × cp: model.experts are cut over them, and tokens sent to them",
    )
    pp: int = Field(1, ge=1, le=1 << 14, description="pipeline-parallel ranks: layers are cut over them")
    virtual_stages: int = Field(1, ge=1, le=1 << 14, description="stages per pipeline rank (interleaved schedule)")
    schedule: Annotated[ScheduleName, or_extended("schedules")] = Field(
        DEFAULT, description="order of forward and backward passes over pp; `roots schedule` draws it"
    )
    sequence_parallel: bool = Field(
        False, description="sequence parallel: norms and dropout cut along the sequence over tp"
    )
    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="what is sharded over dp × cp: 1 optimizer, 2 + gradients, 3 + weights; nothing on one data rank",
    )
    zero_ranks: int | None = Field(
        None,
        ge=2,
        le=1 << 24,
        description="neighbouring ranks of dp × cp over which zero_stage shards, as those of a node; such groups hold "
        "copies (HSDP). Default: all ranks of dp × cp",
    )

    def ranks_per_sample(self) -> int:
        """Ranks that work on the same samples: tp × cp × pp."""
        return self.tp * self.cp * self.pp

    def least_ranks(self) -> int:
        """The least that a run needs, of which every number of processes is a multiple: those, with enough data ranks
        to hold all experts, or all shards."""
        return math.prod(self.factors().values())

    def factors(self) -> dict[str, int]:
        """The keys whose product that is; all but parallel.tp and parallel.pp are among them where they are above 1."""
        found = {"parallel.tp": self.tp, "parallel.cp": self.cp, "parallel.pp": self.pp}
        for key, size in (("parallel.ep", self.ep), ("parallel.zero_ranks", self.zero_ranks or 1)):
            shared = math.gcd(self.cp, size)  # context ranks that hold different experts, or shards
            found[key if shared == 1 else f"{key} / {shared}"] = size // shared
        return {key: size for key, size in found.items() if key in ("parallel.tp", "parallel.pp") or size > 1}

    def head_unit(self) -> int:
        """The number that must divide the numbers of query heads and of key/value heads, because context ranks exchange
        heads; 1 if they do not."""
        return self.tp * self.cp if self.cp > 1 and self.cp_kind == "heads" else 1

    def position_unit(self) -> int:
        """The number that must divide the number of positions: each context rank has two chunks, and under sequence
        parallelism each tensor rank has equal parts of these."""
        parts = self.tp if self.sequence_parallel else 1
        return parts if self.cp == 1 else self.cp * math.lcm(2, parts)
