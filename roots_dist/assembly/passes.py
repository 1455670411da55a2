"""Forward and backward passes of a rank's stages, used by trainer and evaluator.

RankModel + this rank's programs (schedule/) + groups --build_passes--> Passes.forward_backward, Passes.forward
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from roots_dist.assembly.rank_model import RankModel, build_model
from roots_dist.config.records import schedule_of
from roots_dist.config.schema import Config
from roots_dist.parallel.pipeline.executor import Executor, Scales, connect
from roots_dist.schedule.actions import Action, Kind
from roots_dist.schedule.communication import directions, neighbours
from roots_dist.schedule.program import RankProgram, complete, rank_program
from roots_dist.schedule.schedules import Shape
from roots_dist.world.batch import MicroBatch, Term
from roots_dist.world.fuse import Fuse, eager
from roots_dist.world.mesh import SINGLE, Mesh


@dataclass(frozen=True)
class Passes:
    """Forward and backward through the whole model, in any layout."""

    config: Config
    mesh: Mesh
    model: RankModel
    executor: Executor
    _programs: dict[tuple[str, int], RankProgram] = field(default_factory=dict)

    def forward_backward(self, batches: list[MicroBatch], scales: Scales) -> list[Term]:
        """Run the config's schedule and add the gradients of Σ scale · Σ losses to .grad. Returns this rank's terms."""
        return self.executor.run(*self._program("train", len(batches)), batches, scales)

    @torch.no_grad()
    def forward(self, batches: list[MicroBatch]) -> list[Any]:
        """Results of this rank's stages for each microbatch, without dropout: terms, or on the last stage what
        MicroBatch.logits_at asks for. Microbatches may have any shape."""
        module = self.model.module
        was_training = module.training
        if was_training:  # not in generation, where the switch takes as long as a small layer
            module.eval()
        results = self.executor.run(*self._program("forward", len(batches)), batches, {})
        if was_training:
            module.train()
        return results

    def _program(self, purpose: str, num_microbatches: int) -> RankProgram:
        key = (purpose, num_microbatches)
        if key not in self._programs:
            make = training_program if purpose == "train" else inference_program
            self._programs[key] = make(self.config, num_microbatches, self.mesh.pp.rank)
        return self._programs[key]


def training_program(config: Config, num_microbatches: int, rank: int) -> RankProgram:
    """The config's schedule with its sends and receives, for one pipeline rank."""
    p = config.parallel
    return rank_program(schedule_of(config), rank, Shape(p.pp, num_microbatches, p.virtual_stages))


def inference_program(config: Config, num_microbatches: int, rank: int) -> RankProgram:
    """Forward passes only, microbatch by microbatch: each rank computes its stages as their inputs arrive."""
    num_ranks, num_stages = config.parallel.pp, config.num_stages()
    computes = {
        r: [Action(Kind.FORWARD, s, i) for i in range(num_microbatches) for s in range(r, num_stages, num_ranks)]
        for r in (rank, *neighbours(rank, num_ranks, num_stages))
    }
    return complete(rank, computes, num_ranks, num_stages)


def build_passes(config: Config, mesh: Mesh, *, draw: bool = True, fuse: Fuse = eager) -> Passes:
    """Build the model, the groups of its messages and the executor of this rank. Without `draw` the weights have no
    values yet. fuse: what makes kernels of the layers' functions. Collective over the world."""
    model = build_model(config, mesh, draw=draw, fuse=fuse)
    executor = Executor(
        mesh=mesh,
        stages=model.stages,
        num_stages=config.num_stages(),
        spec=lambda stage, batch: model.input_specs[stage](batch),
        lowest_trainable=lambda batch: model.lowest_trainable(batch.step),
        groups=connect(directions(config.parallel.pp, config.num_stages()), mesh),
        deferred=model.tp.deferred,
        same=SINGLE if model.tp.sequence_parallel else mesh.tp,
        exact=model.tp.exact,
        watch=model.tp.watch,
    )
    return Passes(config, mesh, model, executor)
