"""Forward and backward passes of a rank's stages, used by trainer and evaluator.

RankModel + schedule (schedule/) + channels --build_passes--> Passes.forward_backward, Passes.forward
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from roots_dist.assembly.rank_model import RankModel, build_model
from roots_dist.config.schema import Config
from roots_dist.parallel.pipeline.executor import Executor, connect
from roots_dist.schedule import communication
from roots_dist.schedule.actions import Action, Kind, Program, rank_of
from roots_dist.schedule.program import whole_program
from roots_dist.world.batch import MicroBatch, Term
from roots_dist.world.mesh import Mesh


@dataclass(frozen=True)
class Passes:
    """Forward and backward through the whole model, in any layout."""

    config: Config
    mesh: Mesh
    model: RankModel
    executor: Executor
    _programs: dict[tuple[str, int], tuple[list[Action], dict[Action, list[Action]]]] = field(default_factory=dict)

    def forward_backward(self, batches: list[MicroBatch], scales: Mapping[str, float]) -> list[Term]:
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

    def _program(self, purpose: str, num_microbatches: int) -> tuple[list[Action], dict[Action, list[Action]]]:
        """Actions of this rank, and their receipts."""
        key = (purpose, num_microbatches)
        if key not in self._programs:
            make = training_program if purpose == "train" else inference_program
            program, here = make(self.config, num_microbatches), self.mesh.pp.rank
            self._programs[key] = program[here], communication.receipts(program)[here]
        return self._programs[key]


def training_program(config: Config, num_microbatches: int) -> Program:
    """The config's schedule with its sends and receives."""
    p = config.parallel
    return whole_program(p.schedule, p.pp, num_microbatches, p.virtual_stages)


def inference_program(config: Config, num_microbatches: int) -> Program:
    """Forward passes only, microbatch by microbatch: each rank computes its stages as their inputs arrive."""
    stages = range(config.num_stages())
    program = [
        [
            Action(Kind.FORWARD, s, i)
            for i in range(num_microbatches)
            for s in stages
            if rank_of(s, config.parallel.pp) == r
        ]
        for r in range(config.parallel.pp)
    ]
    return communication.with_communication(program, config.parallel.pp, config.num_stages())


def build_passes(config: Config, mesh: Mesh) -> Passes:
    """Build the model, the channels and the executor of this rank. Collective over the world."""
    model = build_model(config, mesh)
    channels = communication.channels(
        training_program(config, config.num_microbatches(mesh.dp.size)), config.parallel.pp
    )
    executor = Executor(
        mesh=mesh,
        stages=model.stages,
        num_stages=config.num_stages(),
        spec=lambda stage, batch: model.input_specs[stage](batch),
        lowest_trainable=lambda batch: model.lowest_trainable(batch.step),
        channels=connect(channels, mesh),
        deferred=model.tp.deferred,
        watch=model.tp.watch,
    )
    return Passes(config, mesh, model, executor)
