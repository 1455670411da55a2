"""One rank's share of the model: its stages and their parameters.

pieces (learning/models/) --partition--> stages --initialize by name--> RankModel --> passes.py
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from roots_dist.config.schema import Config
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.experts import Experts
from roots_dist.learning.models.parameter_locations import depths_at, locate_parameters
from roots_dist.learning.models.pieces import PayloadSpec, PieceSpec, compute_dtype, gradient_dtype
from roots_dist.parallel.optim.trainable import Trainable, trainable
from roots_dist.parallel.pipeline.partition import partition
from roots_dist.parallel.pipeline.stage import Stage
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.deferred import DeferredWeightGrads
from roots_dist.schedule.actions import rank_of
from roots_dist.world.batch import MicroBatch
from roots_dist.world.exact import Exact
from roots_dist.world.fuse import Fuse, eager
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param, initialize_missing, parameters_of, release


@dataclass(frozen=True)
class RankModel:
    """The stages of one rank and their parameters."""

    module: nn.ModuleList
    """The stages as one module, for the engine."""
    stages: dict[int, Stage]
    params: list[Param]
    tp: TensorParallel
    holders: Mapping[str, tuple[int, ...]]
    """Pipeline ranks of each parameter that several of them hold; the same on all ranks."""
    input_specs: tuple[Callable[[MicroBatch], PayloadSpec], ...]
    """Payload that each stage of the whole model receives."""
    trainable: Mapping[str, Trainable]
    """Trainable parameters of the whole model, including those that are still frozen."""
    trainable_from: tuple[int | None, ...]
    """The step from which some parameters of a stage are trained, for each stage of the whole model; None if none ever
    is.
    """

    def pieces(self) -> list[tuple[str, nn.Module]]:
        return [piece for stage in self.stages.values() for piece in stage.named_pieces()]

    def lowest_trainable(self, step: int) -> int:
        """The first stage with parameters that are trained at this step: no gradient is computed below it."""
        return next(
            stage
            for stage, trainable_from in enumerate(self.trainable_from)
            if trainable_from is not None and trainable_from <= step
        )


def build_model(
    config: Config, mesh: Mesh, left_out: Collection[str] = (), *, draw: bool = True, fuse: Fuse = eager
) -> RankModel:
    """Build this rank's share of the model, with initial weights drawn from (seed, name). No communication. left_out:
    names of pieces that it goes without, where others stand for them (runs/plan). Without `draw` weights have shapes
    and no memory: an engine draws them, and keeps what it needs. fuse: what makes kernels of the layers' functions."""
    sequence_parallel = config.parallel.sequence_parallel and mesh.tp.size > 1
    exact = exact_of(config, mesh)
    tp = TensorParallel(
        mesh.tp,
        sequence_parallel,
        cp=mesh.cp,
        cp_kind=config.parallel.cp_kind,
        ep=mesh.ep,
        deferred=DeferredWeightGrads(),
        exact=exact,
        fuse=fuse,
    )
    specs = pieces_of(config, tp)
    runs = stage_runs(config, specs)
    recompute = frozenset(p.name for p in specs if p.is_block and config.train.recompute == "full")
    prefill_only = frozenset(p.name for p in specs if p.prefill_only)
    built: dict[str, nn.Module] = {}
    stages: dict[int, Stage] = {}
    for index, run in enumerate(runs):
        if rank_of(index, mesh.pp.size) != mesh.pp.rank:
            continue
        names = [specs[i].name for i in run if specs[i].name not in left_out]
        for spec in (specs[i] for i in run if specs[i].name in names):
            built[spec.name] = spec.build(built)
            _without_values(spec.name, built[spec.name], config, mesh.device)
        stages[index] = Stage(names, [built[n] for n in names], recompute, prefill_only)
    module = nn.ModuleList(stages.values())
    params = parameters_of([piece for stage in stages.values() for piece in stage.named_pieces()])
    for p in params:
        p.tensor.grad_dtype = gradient_dtype(config)  # autograd adds in it, and keeps .grad in it
    if exact is not None:
        exact.of_cut_experts = frozenset(p.tensor for p in params if p.spec.of_expert and mesh.ep.size > 1)
        exact.uses = {p.tensor: users for p in params if len(users := users_of(p.name, specs)) > 1}
        exact.stages = Counter(parameter for stage in stages.values() for parameter in stage.parameters())
        for name, piece in built.items():
            piece.register_forward_pre_hook(partial(_enter, exact, name))
    if draw:
        initialize_missing(params, config.train.seed)
    input_specs = (lambda batch: {}, *(specs[run.start - 1].output_spec for run in runs[1:]))
    every = specs if mesh.ep.size == 1 else pieces_of(config, TensorParallel())  # of all experts
    locations = locate_parameters(every)
    learnable = trainable(config, depths_at(locations))
    since: dict[int, list[int]] = defaultdict(list)  # piece -> steps from which its parameters are trained
    for name, trained in learnable.items():
        since[locations[name].piece].append(trained.from_step)
    trainable_from = tuple(min((step for i in run for step in since[i]), default=None) for run in runs)
    return RankModel(
        module, stages, params, tp, tie_holders(specs, runs, mesh.pp.size), input_specs, learnable, trainable_from
    )


def _without_values(name: str, piece: nn.Module, config: Config, device: torch.device) -> None:
    """Move a new piece to the device, in the model's dtype, and give the memory of its weights back, which have no
    values yet: no rank ever holds those of its whole model on the host, nor in float32."""
    if device.type == "meta":
        piece.to(device)  # a parameter cannot become one without values in place
    params = parameters_of([(name, piece)])
    dtype = compute_dtype(config)
    for p in params:
        p.tensor.data = torch.empty_like(p.tensor, dtype=dtype, device=device)
    piece.to(device=device, dtype=dtype)  # buffers
    for p in params:
        if p.spec.by_rule:
            p.tensor.data = torch.empty_like(p.tensor, dtype=torch.promote_types(dtype, torch.float32))
    for experts in (module for module in piece.modules() if isinstance(module, Experts)):
        experts.pack()
    if device.type != "meta":  # where nothing has memory
        release(p.tensor for p in params)


def exact_of(config: Config, mesh: Mesh) -> Exact | None:
    """The logical shards of an exact run, as this rank holds them."""
    degrees = config.train.exact
    if degrees is None:
        return None
    return Exact(degrees.tensor, mesh.tp.size, degrees.data, mesh.dp.size, degrees.context, mesh.cp, ep=mesh.ep)


def _enter(exact: Exact, name: str, piece: nn.Module, args: object) -> None:
    exact.piece = name


def users_of(name: str, specs: Sequence[PieceSpec]) -> tuple[str, ...]:
    """Pieces that use a parameter together with others, in order."""
    return tuple(spec.name for spec in specs if name in spec.shared_params)


def stage_runs(config: Config, specs: Sequence[PieceSpec]) -> list[range]:
    """Pieces of each stage, as ranges of indices. Equal on every rank."""
    return partition([p.cost for p in specs], config.num_stages(), [p.is_block for p in specs])


def tie_holders(specs: Sequence[PieceSpec], runs: Sequence[range], num_ranks: int) -> dict[str, tuple[int, ...]]:
    """Parameters that pieces on several pipeline ranks share -> those ranks, in the order of names."""
    found: dict[str, set[int]] = defaultdict(set)
    for index, run in enumerate(runs):
        for name in (name for i in run for name in specs[i].shared_params):
            found[name].add(rank_of(index, num_ranks))
    return {name: tuple(sorted(ranks)) for name, ranks in sorted(found.items()) if len(ranks) > 1}
