"""From a config and a mesh to what a rank runs: its stages, its parameters, its programs, its engine.

    pieces (models/) --partition--> stages --initialize by name--> + programs (pipeline/) = Passes --+ engine (zero/)--> Run
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from roots_dist.config.schema import Config
from roots_dist.mesh import Mesh
from roots_dist.models import gpt
from roots_dist.objectives.base import MicroBatch, Term
from roots_dist.pipeline import passes, schedules
from roots_dist.pipeline.actions import Action, Kind, Program, rank_of
from roots_dist.pipeline.executor import Executor, connect
from roots_dist.pipeline.partition import partition
from roots_dist.pipeline.stage import Stage
from roots_dist.sharding import Param, initialize, parameters_of
from roots_dist.tensor.collectives import Later, Split
from roots_dist.zero.build import build_engine
from roots_dist.zero.seam import Engine


def dtype_of(config: Config) -> torch.dtype:
    """What weights and activations are computed in."""
    if config.advanced.double:
        return torch.float64
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]


@dataclass(frozen=True)
class RankModel:
    """The stages of one rank and their parameters."""

    module: nn.ModuleList
    """The stages, to be handed to an engine."""
    stages: dict[int, Stage]
    params: list[Param]
    split: Split

    def pieces(self) -> list[tuple[str, nn.Module]]:
        return [piece for stage in self.stages.values() for piece in stage.named_pieces()]


def build_model(config: Config, mesh: Mesh) -> RankModel:
    """This rank's share of the model, initial weights drawn from (seed, name). No communication."""
    split = Split(mesh.tp, config.parallel.sequence and mesh.tp.size > 1, Later())
    specs = gpt.pieces(config, split)
    num_stages = config.num_stages()
    runs = partition([p.cost for p in specs], num_stages, [p.is_block for p in specs])
    recompute = frozenset(p.name for p in specs if p.is_block and config.train.recompute == "full")
    built: dict[str, nn.Module] = {}
    stages: dict[int, Stage] = {}
    for index, run in enumerate(runs):
        if rank_of(index, mesh.pp.size) != mesh.pp.rank:
            continue
        for spec in (specs[i] for i in run):
            built[spec.name] = spec.build(built)
        names = [specs[i].name for i in run]
        stages[index] = Stage(names, [built[n] for n in names], recompute)
    module = nn.ModuleList(stages.values()).to(device=mesh.device, dtype=dtype_of(config))
    params = parameters_of([piece for stage in stages.values() for piece in stage.named_pieces()])
    initialize(params, config.train.seed)
    return RankModel(module, stages, params, split)


@dataclass(frozen=True)
class Passes:
    """Forward and backward through the whole model, in whatever layout: what a trainer and an evaluator share."""

    config: Config
    mesh: Mesh
    model: RankModel
    executor: Executor
    _programs: dict[tuple[str, int], list[Action]] = field(default_factory=dict)

    def forward_backward(self, batches: list[MicroBatch], scale: float) -> list[Term]:
        """Gradients of scale · Σ losses into .grad, by the config's schedule. Returns terms on the last stage."""
        return self.executor.run(self._actions("learn", len(batches)), batches, scale)

    @torch.no_grad()
    def forward(self, batches: list[MicroBatch]) -> list:
        """What the last stage makes of each microbatch (terms, or logits where MicroBatch.read asks for them), without
        dropout; an empty list on other stages."""
        self.model.module.eval()
        found = self.executor.run(self._actions("read", len(batches)), batches, 1.0)
        self.model.module.train()
        return found

    def _actions(self, purpose: str, num_microbatches: int) -> list[Action]:
        key = (purpose, num_microbatches)
        if key not in self._programs:
            make = learning_program if purpose == "learn" else reading_program
            self._programs[key] = make(self.config, num_microbatches)[self.mesh.pp.rank]
        return self._programs[key]


@dataclass(frozen=True)
class Run:
    """All that a rank needs for a step. What changes is in the engine's tensors alone."""

    passes: Passes
    engine: Engine

    @property
    def config(self) -> Config:
        return self.passes.config

    @property
    def mesh(self) -> Mesh:
        return self.passes.mesh

    @property
    def params(self) -> list[Param]:
        return self.passes.model.params


def learning_program(config: Config, num_microbatches: int) -> Program:
    p = config.parallel
    return passes.with_communication(
        schedules.make(p.schedule, p.pp, num_microbatches, p.chunks), p.pp, config.num_stages()
    )


def reading_program(config: Config, num_microbatches: int) -> Program:
    """Forward passes only, microbatch after microbatch: each rank does its stages as their input arrives."""
    stages = range(config.num_stages())
    program = [
        [Action(Kind.FORWARD, s, i) for i in range(num_microbatches) for s in stages if rank_of(s, config.parallel.pp) == r]
        for r in range(config.parallel.pp)
    ]
    return passes.with_communication(program, config.parallel.pp, config.num_stages())


def build_passes(config: Config, mesh: Mesh) -> Passes:
    """Collective over the world."""
    model = build_model(config, mesh)
    channels = passes.channels(learning_program(config, config.num_microbatches(mesh.dp.size)), config.parallel.pp)
    executor = Executor(
        mesh=mesh,
        stages=model.stages,
        num_stages=config.num_stages(),
        spec=gpt.payload_spec(config, model.split, dtype_of(config)),
        channels=connect(channels, mesh),
        later=model.split.later,
    )
    return Passes(config, mesh, model, executor)


def build_run(config: Config, mesh: Mesh, make_engine: Callable[..., Engine] = build_engine) -> Run:
    """Collective over the world. make_engine(config, mesh, module, params) shards the optimizer over data ranks."""
    rank = build_passes(config, mesh)
    return Run(rank, make_engine(config, mesh, rank.model.module, rank.model.params))
