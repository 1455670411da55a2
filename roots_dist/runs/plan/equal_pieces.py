"""Pieces of a model that cost the same, and the pipeline ranks and blocks that therefore need to be counted only once.

pieces + what is trained of each --> a kind of each piece --> kinds of pipeline ranks, a Fold of each stage
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from roots_dist.assembly.rank_model import stage_runs
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.parameter_locations import depths_at, locate_parameters
from roots_dist.parallel.optim.trainable import trainable
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.runs.plan.passes import Fold, fold
from roots_dist.schedule.actions import rank_of


class EqualPieces:
    """The pieces of a model by what they cost."""

    def __init__(self, config: Config) -> None:
        specs = pieces_of(config, TensorParallel())
        locations = locate_parameters(specs)
        learned: dict[int, set[str]] = defaultdict(set)
        for name in trainable(config, depths_at(locations)):
            place = locations[name].piece
            learned[place].add(name.removeprefix(specs[place].name))
        self._runs = stage_runs(config, specs)
        self._names = [spec.name for spec in specs]
        self._kinds: list[Hashable | None] = [
            None if spec.kind is None else (spec.kind, frozenset(learned[i])) for i, spec in enumerate(specs)
        ]
        self._first_learning = min(i for i, run in enumerate(self._runs) if any(learned[piece] for piece in run))

    def rank_kinds(self, layout: Layout) -> list[Hashable]:
        """Key of each pipeline rank that is equal for ranks with the same work."""

        def kind(stage: int) -> Hashable:
            from_bottom = (stage == 0, stage >= self._first_learning, stage > self._first_learning)
            return from_bottom, tuple(self._kinds[i] or self._names[i] for i in self._runs[stage])

        return [tuple(map(kind, range(pp, len(self._runs), layout.pp))) for pp in range(layout.pp)]

    def folds(self, layout: Layout, pp_rank: int) -> dict[int, Fold]:
        """The Fold of each stage of a rank, by which its equal pieces are counted once."""
        return {
            stage: fold([self._names[i] for i in run], [self._kinds[i] for i in run])
            for stage, run in enumerate(self._runs)
            if rank_of(stage, layout.pp) == pp_rank
        }
