"""Count one pipeline rank's part of a step on the meta device: what it saves, computes and sends in any layout.

    config + layout + pp rank --build_model on the meta device, with recording groups--> the rank's own stages
        --forward, backward under a CostCounter--> a StageCost of each --predict.py--> memory, traffic, time

The trainer's own code is counted, not a formula about it; a laptop counts any rank of thousands, one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.assembly.rank_model import RankModel, build_model
from roots_dist.config.records import objective_of, schedule_of
from roots_dist.config.schema import Config
from roots_dist.layout import AxisName, Layout
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.parallel.pipeline.executor import run_backward
from roots_dist.runs.plan.cost_counter import CostCounter
from roots_dist.runs.plan.equal_pieces import EqualPieces
from roots_dist.runs.plan.exact_cost import gradient_bytes, sum_over_model
from roots_dist.runs.plan.passes import Fold, Message, Meter, Pass, UnequalError
from roots_dist.runs.plan.symbols import without_symbols
from roots_dist.schedule.actions import Kind
from roots_dist.schedule.schedules import record_of
from roots_dist.world.batch import MicroBatch
from roots_dist.world.exact import Exact
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class StageCost:
    passes: dict[Kind, Pass]
    """FORWARD, and BACKWARD or INPUT and WEIGHT, depending on the schedule."""
    saved_bytes: int
    """Bytes that a microbatch holds until its backward pass, including the stage's input and output."""
    deferred_bytes: int
    """Bytes that it holds from INPUT to WEIGHT."""
    input_bytes: int
    """Bytes of its input."""
    input_grad_bytes: int
    """Bytes of its input's gradient."""
    output_bytes: int
    """Bytes of its output."""
    output_grad_bytes: int
    """Bytes of its output's gradient."""
    gradients: int
    """Bytes of the gradients of the stage's weights."""


@dataclass(frozen=True, kw_only=True)
class RankCost:
    """Costs of one pipeline rank in a step."""

    stages: dict[int, StageCost]
    params: list[Param]
    """Slices and copies of parameters, without data. A block that stands for several has its parameters once for
    each."""
    pieces: tuple[int, ...]
    """Bytes of each piece's weights, without those that an earlier piece of the rank has too, and without experts that
    no other rank holds, which ZeRO does not cut."""
    once: tuple[Message, ...]
    """Messages between tensor ranks once per step: partial gradients."""
    first_trainable: int
    """First stage of the model with trainable parameters: no gradient goes below it."""
    ties: Mapping[str, int]
    """Parameter that other pipeline ranks hold too -> number of ranks that sum its gradient: those, this one included,
    with DeepSpeed all of their data ranks too."""
    exact: Exact | None
    """Gradients that an exact run keeps after a microbatch; None if the run is not exact."""


class _Done(dist.Work):
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class RecordingGroup(dist.ProcessGroup):
    """A group of `size` ranks of which none exists. Records what would be sent; only zeros arrive."""

    def __init__(self, size: int, axis: AxisName = "tp", messages: list[Message] | None = None) -> None:
        """messages: the list that is added to, which several groups may share."""
        super().__init__(0, size)  # type: ignore[call-arg] # the overload for groups written in Python has no type
        self.axis, self.messages = axis, [] if messages is None else messages

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Done:  # type: ignore[override] # its first overload
        return self._sent("all_reduce", tensors[0])

    def all_gather_single(self, out: Tensor, tensor: Tensor, opts: Any = None) -> _Done:
        return self._sent("all_gather", out.zero_())

    def reduce_scatter_single(self, out: Tensor, tensor: Tensor, opts: Any = None) -> _Done:
        out.zero_()
        return self._sent("reduce_scatter", tensor)

    def all_to_all_single(
        self, out: Tensor, tensor: Tensor, received: Any = None, sent: Any = None, opts: Any = None
    ) -> _Done:
        """The others send as much as they are sent."""
        out.copy_(tensor) if out.shape == tensor.shape else out.zero_()
        return self._sent("all_to_all", tensor)

    def _sent(self, operation: str, whole: Tensor) -> _Done:
        self.messages.append(Message(operation, whole.nbytes, self.axis))
        return _Done()


def _fused(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool, scale: float | None
) -> Tensor:
    """Attention as fused kernels do it, which the meta device would split into scores [B, h, Q, S]."""
    aten = torch.ops.aten
    if attn_mask is not None and attn_mask.requires_grad:  # a trained bias: no fused CPU kernel has its gradient
        made = aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    else:
        made = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
    out: Tensor = made[0]
    return out


def count_rank_cost(config: Config, layout: Layout, pp_rank: int, equal: EqualPieces | None = None) -> RankCost:
    """Run a step of tensor rank 0 on shapes alone, with full microbatches, and count it. Only a few of equal blocks are
    run.

    Takes seconds; allocates nothing of the model's size and joins no group.
    """
    with without_symbols():
        try:
            return _count(config, layout, pp_rank, (equal or EqualPieces(config)).folds(layout, pp_rank))
        except UnequalError:
            return _count(config, layout, pp_rank, {})


def _count(config: Config, layout: Layout, pp_rank: int, folds: Mapping[int, Fold]) -> RankCost:
    messages: list[Message] = []
    with META:
        left_out = frozenset(name for fold in folds.values() for name in fold.left_out)
        model = build_model(config, recording_mesh(layout, pp_rank, META, messages), left_out)
    batch = one_microbatch(config, model.tp.of_context)
    counter = CostCounter()
    number_of = {
        piece: folds[index].count(name) if index in folds else 1
        for index, stage in model.stages.items()
        for name, piece in stage.named_pieces()
    }
    first_of = {p: piece for _, piece in reversed(model.pieces()) for p in piece.parameters()}
    params = [p for p in model.params for _ in range(number_of[first_of[p.tensor]])]
    alone = layout.ep > 1 and layout.edp == 1
    uncut = frozenset(p.tensor for p in model.params if alone and p.spec.of_expert)
    # patches the function, because a torch mode would not be active when backward recomputes
    with META, mock.patch.object(F, "scaled_dot_product_attention", _fused):
        stages = count_stage_costs(config, model, batch.to(META), counter, messages, folds, uncut)
        del messages[:]
        sum_over_model(params, model.tp)
    together = layout.dp_cp if config.advanced.engine == "deepspeed" else 1
    ties = {name: len(ranks) * together for name, ranks in model.holders.items() if pp_rank in ranks}
    share = gradient_share(config, layout)
    once = tuple(m._replace(bytes=m.bytes // share) for m in messages)
    weights = dict.fromkeys(number_of, 0)
    for p in model.params:
        weights[first_of[p.tensor]] += 0 if p.tensor in uncut else p.tensor.nbytes
    pieces = [piece for piece, number in number_of.items() for _ in range(number)]
    return RankCost(
        stages=stages,
        params=params,
        pieces=tuple(weights[piece] for piece in pieces),
        once=once,
        first_trainable=first_trainable_stage(model),
        ties=ties,
        exact=model.tp.exact,
    )


def gradient_share(config: Config, layout: Layout) -> int:
    """The number of data ranks that share the sums of gradients over tensor and pipeline ranks: each sums its part. In
    an exact run these come first, on all data ranks."""
    if config.train.exact is not None:
        return 1
    return layout.shard if config.advanced.engine == "reference" and config.parallel.zero_stage >= 1 else 1


def one_microbatch(config: Config, cut: Callable[[Tensor], Tensor] = lambda whole: whole) -> MicroBatch:
    """cut: what a context rank holds of what is scored."""
    shards = 1 if config.train.exact is None else config.train.exact.data
    batch = random_batches(config.changed({"train.global_batch": shards * config.train.micro_batch}), 0, 0, 1)[0]
    return batch.with_scored_positions(cut) if objective_of(config).masks else batch


def recording_mesh(layout: Layout, pp_rank: int, device: torch.device, messages: list[Message]) -> Mesh:
    """A fake mesh whose tensor, context and expert groups record what would be sent."""
    tp = RecordingGroup(layout.tp, "tp", messages) if layout.tp > 1 else None
    cp = RecordingGroup(layout.cp, "cp", messages) if layout.cp > 1 else None
    ep = RecordingGroup(layout.ep, "ep", messages) if layout.ep > 1 else None
    return fake_mesh(layout, pp_rank, tp, device, cp, ep)


def fake_mesh(
    layout: Layout,
    pp_rank: int,
    tp_group: dist.ProcessGroup | None,
    device: torch.device = META,
    cp_group: dist.ProcessGroup | None = None,
    ep_group: dist.ProcessGroup | None = None,
) -> Mesh:
    """Mesh of a rank of a world that does not exist: rank 0 of every other axis."""

    def axis(name: str, size: int, rank: int = 0, group: dist.ProcessGroup | None = None) -> Axis:
        return Axis(name, size, rank, tuple(range(size)), group)

    return Mesh(
        layout=layout,
        rank=layout.rank(pp_rank, 0, 0),
        device=device,
        timeout=timedelta(0),
        tp=axis("tp", layout.tp, group=tp_group),
        pp=axis("pp", layout.pp, pp_rank),
        dp=axis("dp", layout.dp),
        cp=axis("cp", layout.cp, group=cp_group),
        dp_cp=axis("dp_cp", layout.dp_cp),
        ep=axis("ep", layout.ep, group=ep_group),
        edp=axis("edp", layout.edp),
        shard=axis("shard", layout.shard),
        replica=axis("replica", layout.replica),
        model=axis("model", layout.tp * layout.pp, pp_rank * layout.tp),
        world=axis("world", layout.world_size, layout.rank(pp_rank, 0, 0)),
    )


def count_stage_costs(
    config: Config,
    model: RankModel,
    batch: MicroBatch,
    counter: CostCounter,
    messages: list[Message],
    folds: Mapping[int, Fold] | None = None,
    uncut: Set[nn.Parameter] = frozenset(),
) -> dict[int, StageCost]:
    """Costs of each stage of this rank with all parameters trained that ever will be. Also works on tensors with data,
    which must cost the same. folds: which pieces of a stage stand for others, that the model lacks. uncut: the experts
    that no other rank holds, whose gradients are not handed on."""
    split_backward = record_of(schedule_of(config)).splits_backward
    for p in model.params:
        p.tensor.requires_grad_(p.name in model.trainable)
    return {
        index: _stage_cost(
            model, index, batch, counter, messages, split_backward, (folds or {}).get(index, Fold()), uncut
        )
        for index in sorted(model.stages)
    }


def first_trainable_stage(model: RankModel) -> int:
    """First stage with trainable parameters, once all are trained that ever will be."""
    return next(stage for stage, joins in enumerate(model.trainable_from) if joins is not None)


def _stage_cost(
    model: RankModel,
    index: int,
    batch: MicroBatch,
    counter: CostCounter,
    messages: list[Message],
    split_backward: bool,
    fold: Fold,
    uncut: Set[nn.Parameter],
) -> StageCost:
    """Cost of the second of two microbatches: by then everything that is allocated once exists, including the gradients
    of weights."""
    deferred, stage = model.tp.deferred, model.stages[index]
    meter = stage.hooks = Meter(counter, messages, stage, deferred, fold)
    needs_input_grad, is_trained = index > first_trainable_stage(model), index >= first_trainable_stage(model)
    device = batch.tokens.device
    for _ in range(2):
        with counter:
            start = meter.live
            payload = {
                name: torch.zeros(
                    shape, dtype=dtype, device=device, requires_grad=needs_input_grad and dtype.is_floating_point
                )
                for name, (shape, dtype) in model.input_specs[index](batch).items()
            }
            input_bytes = meter.live - start
            with meter.of(Kind.FORWARD):
                out = stage(payload, batch)
                loss = sum(term.sum for term in out.results) if out.results else None
            saved_bytes = meter.live - start
            outputs = [t for t in out.payload.values() if t.requires_grad]
            scored = [] if loss is None or not loss.requires_grad else [loss]
            roots = scored + outputs
            gradients = [torch.ones_like(t) for t in outputs]
            output_bytes, output_grad_bytes = (
                sum(t.nbytes for t in out.payload.values()),
                sum(t.nbytes for t in outputs),
            )
            del out, loss, scored, outputs
            deferred.enabled = split_backward
            with meter.of(Kind.INPUT if split_backward else Kind.BACKWARD):
                if roots:
                    run_backward(roots, [*map(torch.ones_like, roots[: len(roots) - len(gradients)]), *gradients])
            deferred.enabled = False
            input_grad_bytes = sum(t.grad.nbytes for t in payload.values() if t.grad is not None)
            del payload, roots, gradients
            deferred_bytes, deferred_work = meter.live - start, deferred.drain()
            if split_backward:
                with meter.of(Kind.WEIGHT):
                    meter.run_deferred(deferred_work)
            del deferred_work
    stage.hooks = None
    users: dict[nn.Parameter, list[str]] = {}
    for name, piece in stage.named_pieces():
        for p in piece.parameters():
            users.setdefault(p, []).append(name)
    bytes_of = {p: gradient_bytes(p, model.tp.exact) for p in users}
    own, shared = Counter[str](), Counter[str]()
    for p in users.keys() - uncut:
        (own if len(users[p]) == 1 else shared)[users[p][0]] += bytes_of[p]
    return StageCost(
        passes={
            kind: one if kind is Kind.FORWARD else replace(one, handed_on=meter.handed_on(kind, own, shared))
            for kind, one in meter.passes.items()
        },
        saved_bytes=saved_bytes if is_trained else 0,  # tensors without a gradient are not saved
        deferred_bytes=deferred_bytes if split_backward else 0,
        input_bytes=input_bytes,
        input_grad_bytes=input_grad_bytes,
        output_bytes=output_bytes,
        output_grad_bytes=output_grad_bytes,
        gradients=sum(bytes_of[p] * fold.count(names[0]) for p, names in users.items()),
    )
