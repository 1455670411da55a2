"""From a config and a mesh to what a rank runs: its stages, its parameters, its programs, its engine.

    pieces (models/) --partition--> stages --initialize by name--> + programs (pipeline/) = Passes --+ engine (zero/)--> Run
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from roots_dist.config.schema import Config
from roots_dist.mesh import Axis, Mesh
from roots_dist.models import pieces_of
from roots_dist.models.outline import outline
from roots_dist.models.pieces import PayloadSpec, PieceSpec, dtype_of
from roots_dist.objectives import make_objective
from roots_dist.objectives.base import MicroBatch, Objective, Term
from roots_dist.optim.phases import Learned, learned
from roots_dist.pipeline import passes, schedules
from roots_dist.pipeline.actions import Action, Kind, Program, rank_of
from roots_dist.pipeline.executor import Executor, connect
from roots_dist.pipeline.partition import partition
from roots_dist.pipeline.stage import Stage
from roots_dist.sharding import Param, initialize, parameters_of
from roots_dist.stopwatch import Stopwatch
from roots_dist.tensor.collectives import Later, Split
from roots_dist.zero.build import build_engine
from roots_dist.zero.seam import Engine


@dataclass(frozen=True)
class RankModel:
    """The stages of one rank and their parameters."""

    module: nn.ModuleList
    """The stages, to be handed to an engine."""
    stages: dict[int, Stage]
    params: list[Param]
    split: Split
    holders: Mapping[str, tuple[int, ...]]
    """Of each parameter that several pipeline ranks hold: which, the same on all ranks."""
    inputs: tuple[Callable[[MicroBatch], PayloadSpec], ...]
    """What comes into each stage of the whole model."""
    learned: Mapping[str, Learned]
    """What will ever learn, of the whole model."""
    joins: tuple[int | None, ...]
    """The step since which something of each stage learns, of the whole model; None: nothing of it ever does."""

    def pieces(self) -> list[tuple[str, nn.Module]]:
        return [piece for stage in self.stages.values() for piece in stage.named_pieces()]

    def lowest(self, step: int) -> int:
        """The first stage of which something learns at this step: no gradient goes below it."""
        return next(stage for stage, joins in enumerate(self.joins) if joins is not None and joins <= step)


def build_model(config: Config, mesh: Mesh) -> RankModel:
    """This rank's share of the model, initial weights drawn from (seed, name). No communication."""
    split = Split(mesh.tp, config.parallel.sequence and mesh.tp.size > 1, Later())
    specs = pieces_of(config, split)
    runs = partition([p.cost for p in specs], config.num_stages(), [p.is_block for p in specs])
    recompute = frozenset(p.name for p in specs if p.is_block and config.train.recompute == "full")
    once = frozenset(p.name for p in specs if p.once)
    built: dict[str, nn.Module] = {}
    stages: dict[int, Stage] = {}
    for index, run in enumerate(runs):
        if rank_of(index, mesh.pp.size) != mesh.pp.rank:
            continue
        for spec in (specs[i] for i in run):
            built[spec.name] = spec.build(built)
        names = [specs[i].name for i in run]
        stages[index] = Stage(names, [built[n] for n in names], recompute, once)
    module = nn.ModuleList(stages.values()).to(device=mesh.device, dtype=dtype_of(config))
    params = parameters_of([piece for stage in stages.values() for piece in stage.named_pieces()])
    if mesh.device.type != "meta":  # a rehearsal has no numbers
        initialize(params, config.train.seed)
    inputs = (lambda batch: {}, *(specs[run.start - 1].hands_on for run in runs[1:]))
    places = outline(specs)
    learns = learned(config, {name: place.depth for name, place in places.items()})
    since = [[learns[n].from_step for n, place in places.items() if place.piece in run and n in learns] for run in runs]
    joins = tuple(min(steps, default=None) for steps in since)
    return RankModel(module, stages, params, split, _holders(specs, runs, mesh.pp.size), inputs, learns, joins)


def _holders(specs: Sequence[PieceSpec], runs: Sequence[range], num_ranks: int) -> dict[str, tuple[int, ...]]:
    """Parameters that pieces on several pipeline ranks share -> those ranks, in the order of names."""
    found: dict[str, set[int]] = defaultdict(set)
    for index, run in enumerate(runs):
        for name in (name for i in run for name in specs[i].shares):
            found[name].add(rank_of(index, num_ranks))
    return {name: tuple(sorted(ranks)) for name, ranks in sorted(found.items()) if len(ranks) > 1}


@dataclass(frozen=True)
class Passes:
    """Forward and backward through the whole model, in whatever layout: what a trainer and an evaluator share."""

    config: Config
    mesh: Mesh
    model: RankModel
    executor: Executor
    _programs: dict[tuple[str, int], tuple[list[Action], dict[Action, list[Action]]]] = field(default_factory=dict)

    def forward_backward(self, batches: list[MicroBatch], scales: Mapping[str, float]) -> list[Term]:
        """Gradients of Σ scale · Σ losses into .grad, by the config's schedule. Returns this rank's terms."""
        return self.executor.run(*self._program("learn", len(batches)), batches, scales)

    @torch.no_grad()
    def forward(self, batches: list[MicroBatch]) -> list:
        """What this rank's stages find in each microbatch (terms, or on the last stage what MicroBatch.read asks for),
        without dropout. Microbatches may be of any shape."""
        module = self.model.module
        learning = module.training
        if learning:  # generation has turned it off already: it takes as long as a small layer
            module.eval()
        found = self.executor.run(*self._program("read", len(batches)), batches, {})
        if learning:
            module.train()
        return found

    def _program(self, purpose: str, num_microbatches: int) -> tuple[list[Action], dict[Action, list[Action]]]:
        """This rank's actions, and their receipts."""
        key = (purpose, num_microbatches)
        if key not in self._programs:
            make = learning_program if purpose == "learn" else reading_program
            program, here = make(self.config, num_microbatches), self.mesh.pp.rank
            self._programs[key] = program[here], passes.receipts(program)[here]
        return self._programs[key]


@dataclass(frozen=True)
class Run:
    """All that a rank needs for a step. What changes is in the engine's tensors alone."""

    passes: Passes
    engine: Engine
    objective: Objective
    ties: Mapping[str, Axis]
    """Of each parameter of this rank that other pipeline ranks hold too: all of these ranks."""

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
        spec=lambda stage, batch: model.inputs[stage](batch),
        lowest=lambda batch: model.lowest(batch.step),
        channels=connect(channels, mesh),
        later=model.split.later,
        watch=model.split.watch,
    )
    return Passes(config, mesh, model, executor)


def build_run(
    config: Config, mesh: Mesh, make_engine: Callable[..., Engine] = build_engine, objective: Objective | None = None
) -> Run:
    """Collective over the world. make_engine(config, mesh, module, params, learned) shards the optimizer over data ranks."""
    rank = build_passes(config, mesh)
    axes = {ranks: mesh.some_pp(f"tie {'-'.join(map(str, ranks))}", ranks) for ranks in dict.fromkeys(rank.model.holders.values())}
    ties = {name: axes[ranks] for name, ranks in rank.model.holders.items() if mesh.pp.rank in ranks}
    engine = make_engine(config, mesh, rank.model.module, rank.model.params, rank.model.learned)
    return Run(rank, engine, objective or make_objective(config), ties)
