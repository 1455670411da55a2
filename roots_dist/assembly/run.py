"""Everything that a training rank needs for a step: passes, engine, objective, tied parameters.

Passes --+ engine (parallel/zero/)--> Run --> runs/train/step.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from roots_dist.assembly.fusing import choose_fuse
from roots_dist.assembly.passes import Passes, build_passes
from roots_dist.config.schema import Config
from roots_dist.learning.objectives import make_objective
from roots_dist.parallel.zero.build import build_engine
from roots_dist.parallel.zero.seam import Engine
from roots_dist.world.batch import Objective
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param
from roots_dist.world.stopwatch import Stopwatch


@dataclass(frozen=True)
class Run:
    """Everything that a rank needs for a step. Only the engine's tensors change."""

    passes: Passes
    engine: Engine
    objective: Objective
    ties: Mapping[str, Axis]
    """The axis over the pipeline ranks that hold a parameter, for each parameter of this rank that others hold too:
    over those with the same data rank, or over all where DeepSpeed sums over them (zero/engine.py)."""

    @property
    def config(self) -> Config:
        return self.passes.config

    @property
    def mesh(self) -> Mesh:
        return self.passes.mesh

    @property
    def params(self) -> list[Param]:
        return self.passes.model.params

    @property
    def watch(self) -> Stopwatch:
        return self.passes.executor.watch


def build_run(
    config: Config, mesh: Mesh, make_engine: Callable[..., Engine] = build_engine, objective: Objective | None = None
) -> Run:
    """Build everything for training. Collective over the world. make_engine(config, mesh, module, params, trainable,
    ties) creates the engine, which draws the weights."""
    rank = build_passes(config, mesh, draw=False, fuse=choose_fuse(config, mesh))
    over_data = config.advanced.engine == "deepspeed"
    axes = {
        ranks: mesh.tie_axis(f"tie {'-'.join(map(str, ranks))}", ranks, over_data=over_data)
        for ranks in dict.fromkeys(rank.model.holders.values())
    }
    ties = {name: axes[ranks] for name, ranks in rank.model.holders.items() if mesh.pp.rank in ranks}
    if (exact := rank.model.tp.exact) is not None:
        exact.ties = ties
        exact.apart = frozenset(p.tensor for p in rank.model.params if p.name in ties or p.is_summed_over_tp)
    engine = make_engine(config, mesh, rank.model.module, rank.model.params, rank.model.trainable, ties)
    return Run(rank, engine, objective or make_objective(config), ties)
