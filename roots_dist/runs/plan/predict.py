"""Predict a step rank by rank: memory, traffic and, on a known cluster, seconds. Starts no process.

    rank_cost.py: what each pipeline rank saves, computes, sends --the schedule that will run, simulated--> Plan

The parts of data parallelism and the optimizer follow from the rank's own parameters by arithmetic; DeepSpeed's buffers
were measured (tests/parity/test_plan.py compares everything with what running ranks hold and send).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from roots_dist.accounting.flops import mfu
from roots_dist.accounting.memory import rank_state, save_copy_bytes
from roots_dist.accounting.sizes import parameters
from roots_dist.config.records import schedule_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.layout import AxisName, Layout
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.learning.models.parameter_locations import shapes
from roots_dist.parallel.optim.norm import norm_bytes
from roots_dist.parallel.pipeline.executor import is_skipped
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.runs.plan.activations import gathers, parts_of_payloads, peak_activations
from roots_dist.runs.plan.cluster_speed import ClusterSpeed, ring_bytes
from roots_dist.runs.plan.dp_messages import BETWEEN_DATA_RANKS, dp_messages
from roots_dist.runs.plan.equal_pieces import EqualPieces
from roots_dist.runs.plan.exact_cost import gradient_bytes, summed_bytes
from roots_dist.runs.plan.passes import Message
from roots_dist.runs.plan.rank_cost import RankCost, count_rank_cost, gradient_share
from roots_dist.runs.plan.timing import time_passes
from roots_dist.schedule.actions import Action, Kind, Program
from roots_dist.schedule.check import Times, play
from roots_dist.schedule.communication import COMPUTE
from roots_dist.schedule.program import whole_program

TOUCHED = 7
"""Numbers that AdamW reads and writes per parameter: gradient, weight and moments in, weight and moments out."""


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Prediction for one pipeline rank in bytes, equal on its tensor and data ranks except for rounding."""

    pp: int
    parameters: int
    """Number of parameters that this rank holds, copies included."""
    weights: int
    optimizer: int
    """Master weights, moments, and the engine's communication buffers."""
    gradients: int
    activations: int
    """Peak of forward and backward passes beyond the gradients, or in an exact run of the norm after them."""
    sent: Mapping[str, float]
    """Bytes sent per step, by axis."""
    save_copy: int
    """Host memory of a copy for checkpoints, from the first one on; beside the peak."""

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds of a step by part."""

    compute: float
    """Seconds of the rank that computes longest, without waiting for its tensor and context ranks."""
    tp: float
    """Messages between tensor ranks."""
    cp: float
    """Messages between context ranks."""
    ep: float
    """Tokens on their way to experts and back."""
    bubble: float
    """Waiting for other stages."""
    dp: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.compute + self.tp + self.cp + self.ep + self.bubble + self.dp + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    config: Config
    layout: Layout
    ranks: tuple[RankPlan, ...]
    seconds: Seconds | None = None
    """None without a cluster profile."""
    mfu: float | None = None

    @property
    def adapters(self) -> int:
        """Number of parameters of low-rank adapters in the whole model."""
        if self.config.finetune.strategy != "lora":
            return 0
        return sum(map(prod, shapes(pieces_of(self.config, TensorParallel())).values())) - parameters(self.config)

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return max(rank.peak for rank in self.ranks)

    @property
    def peak_with_copy(self) -> int:
        """The same with the copy for checkpoints, which a process on a CPU holds beside it."""
        return max(rank.peak + rank.save_copy for rank in self.ranks)


def predict(
    config: Config, layout: Layout, cluster: ClusterSpeed | None = None, device: torch.device | None = None
) -> Plan:
    """Predict a step; takes some seconds per kind of pipeline rank (first, middle, last). With `device`, the passes are
    timed on it instead of computed from the cluster's rates. Raises DataError if `cluster` lacks a link that the layout
    uses."""
    equal = EqualPieces(config)
    kinds = equal.rank_kinds(layout)
    found = {kind: count_rank_cost(config, layout, kinds.index(kind), equal) for kind in dict.fromkeys(kinds)}
    rank_costs = [_shift_stages(found[kind], pp - kinds.index(kind)) for pp, kind in enumerate(kinds)]
    p = config.parallel
    program = [
        [
            action
            for action in actions
            if action.kind is Kind.FORWARD or not is_skipped(action, rank_costs[0].first_trainable)
        ]
        for actions in whole_program(schedule_of(config), p.pp, config.num_microbatches(layout.dp), p.virtual_stages)
    ]
    ranks = tuple(_rank_plan(config, layout, pp, found, program[pp]) for pp, found in enumerate(rank_costs))
    if cluster is None:
        return Plan(config=config, layout=layout, ranks=ranks)
    if device is None:
        rates = (cluster.flops_per_s, cluster.bytes_per_s, cluster.op_overhead_s)
        costs = {stage: cost for rank_cost in rank_costs for stage, cost in rank_cost.stages.items()}
        compute_seconds = {
            (k, s): done.work.seconds(*rates) for s, cost in costs.items() for k, done in cost.passes.items()
        }
    else:
        timed = {kind: time_passes(config, layout, kinds.index(kind), device) for kind in dict.fromkeys(kinds)}
        compute_seconds = {
            (k, stage + pp - kinds.index(kind)): seconds
            for pp, kind in enumerate(kinds)
            for (k, stage), seconds in timed[kind].items()
        }
    seconds = _seconds(config, layout, cluster, rank_costs, program, compute_seconds)
    peak = cluster.peak_flops
    share = peak and mfu(flops_per_step(config), seconds.step, peak * layout.world_size)
    return Plan(config=config, layout=layout, ranks=ranks, seconds=seconds, mfu=share)


def _shift_stages(rank_cost: RankCost, by: int) -> RankCost:
    stages = {stage + by: cost for stage, cost in rank_cost.stages.items()}
    return replace(rank_cost, stages=stages)


def _rank_plan(config: Config, layout: Layout, pp: int, found: RankCost, actions: list[Action]) -> RankPlan:
    numbers = sum(p.tensor.numel() for p in found.params)
    trainable_numbers = sum(p.tensor.numel() for p in found.params if p.tensor.requires_grad)
    gradients = sum(gradient_bytes(p.tensor, found.exact) for p in found.params)
    held = (numbers, trainable_numbers, *_numbers_of_experts(layout, found))
    state = rank_state(config, layout, *held)
    zero, cut = config.parallel.zero_stage, layout.dp_cp > 1
    stage_3 = zero >= 3 and config.advanced.engine == "deepspeed"
    shard = state.gradients if stage_3 else 0  # beside the gradients of the passes
    handed_on = (
        zero >= 2 and cut and config.advanced.engine == "reference" and config.train.exact is None
    )  # piece by piece
    kept = state.gradients if handed_on else gradients
    parts = parts_of_payloads(config, layout)
    activations = peak_activations(actions, found, gradients, kept, parts) - kept
    summed = summed_bytes(found.params, found.exact, found.ties)
    if config.advanced.engine == "reference":  # the norm is computed when the passes are over, and their sums made
        ranks = layout.shard if zero >= 1 else 1
        sizes = [-(-p.tensor.numel() // ranks) for p in found.params if p.tensor.requires_grad and p.is_counted]
        activations = max(activations, norm_bytes(sizes, config.train.device, found.exact is not None) - summed)
    return RankPlan(
        pp=pp,
        parameters=numbers,
        weights=state.weights,
        optimizer=state.optimizer + state.buffers + shard,
        gradients=kept + summed,
        activations=activations + _gathered_bytes(config, layout, found),
        sent={
            "tp": _sent_in_passes("tp", actions, found, layout.tp) + _sent_in_gathers(config, layout, actions, found),
            "cp": _sent_in_passes("cp", actions, found, layout.cp),
            "ep": _sent_in_passes("ep", actions, found, layout.ep),
            "pp": _sent_pp(config, layout, actions, found),
            "dp": sum(
                ring_bytes(m.operation, m.bytes, getattr(layout, m.axis))
                for m in dp_messages(config, layout, found, actions)
            ),
        },
        save_copy=save_copy_bytes(config, layout, *held),
    )


def _gathered_bytes(config: Config, layout: Layout, found: RankCost) -> int:
    """Bytes of the gathered weights under ZeRO-3: of the largest piece, and of another unless DeepSpeed gathers."""
    if config.parallel.zero_stage < 3 or layout.dp_cp == 1:
        return 0
    return sum(sorted(found.pieces)[-(1 if config.advanced.engine == "deepspeed" else 2) :])


def _sent_in_passes(axis: AxisName, actions: list[Action], found: RankCost, size: int) -> float:
    def sent(messages: Iterable[Message]) -> float:
        return sum(ring_bytes(m.operation, m.bytes, size) for m in messages if m.axis == axis)

    passes = Counter((kind, stage) for kind, stage, _ in actions if kind in COMPUTE)
    in_passes = sum(times * sent(found.stages[stage].passes[kind].messages) for (kind, stage), times in passes.items())
    return in_passes + sent(found.once)


def _sent_in_gathers(config: Config, layout: Layout, actions: list[Action], found: RankCost) -> float:
    """Bytes that a tensor rank sends so that all have what each has received a part of."""
    return sum(
        ring_bytes(m.operation, m.bytes, layout.tp)
        for kind, stage, _ in actions
        if kind in COMPUTE
        for m in gathers(config, layout, found.stages[stage], kind, stage)
    )


def _sent_pp(config: Config, layout: Layout, actions: list[Action], found: RankCost) -> float:
    tied = [p for p in found.params if p.name in found.ties and p.tensor.requires_grad]
    share = gradient_share(config, layout)
    bytes_of = {p.name: p.tensor.numel() * present(p.tensor.grad_dtype).itemsize for p in tied}
    if found.exact is not None:
        bytes_of = {p.name: bytes_of[p.name] * found.exact.num_summed_over_stages(p.tensor) for p in tied}
    ties = sum(ring_bytes("all_reduce", bytes_of[p.name] // share, found.ties[p.name]) for p in tied)
    outputs = sum(found.stages[stage].output_bytes for kind, stage, _ in actions if kind is Kind.SEND_FORWARD)
    gradients = sum(found.stages[stage].input_grad_bytes for kind, stage, _ in actions if kind is Kind.SEND_BACKWARD)
    return ties + (outputs + gradients) / parts_of_payloads(config, layout)


def _numbers_of_experts(layout: Layout, found: RankCost) -> tuple[int, int]:
    """Numbers of experts that are cut over parallel.ep, and of those that are trained."""
    cut = [p.tensor for p in found.params if p.spec.of_expert and layout.ep > 1]
    return sum(t.numel() for t in cut), sum(t.numel() for t in cut if t.requires_grad)


def _seconds(
    config: Config,
    layout: Layout,
    cluster: ClusterSpeed,
    rank_costs: list[RankCost],
    program: Program,
    compute_seconds: Mapping[tuple[Kind, int], float],
) -> Seconds:
    here = layout.place(0)

    def link(axis: AxisName, messages: Iterable[Message], size: int) -> float:
        group = layout.along(axis, here)
        return sum(
            cluster.link(group, m.operation).seconds(m.operation, m.bytes, size) for m in messages if m.axis == axis
        )

    costs = {stage: cost for found in rank_costs for stage, cost in found.stages.items()}
    sending = {
        (k, s): (*done.messages, *gathers(config, layout, cost, k, s))
        for s, cost in costs.items()
        for k, done in cost.passes.items()
    }
    tp_seconds = {key: link("tp", messages, layout.tp) for key, messages in sending.items()}
    cp_seconds = {key: link("cp", messages, layout.cp) for key, messages in sending.items()}
    ep_seconds = {key: link("ep", messages, layout.ep) for key, messages in sending.items()}
    payload = Message("send", costs[0].output_bytes // parts_of_payloads(config, layout), "pp")
    transfer = link("pp", [payload], 2) if layout.pp > 1 else 0.0
    parts = compute_seconds, tp_seconds, cp_seconds, ep_seconds
    exact = {key: sum(seconds[key] for seconds in parts) for key in compute_seconds}
    times = Times(exact=exact, transfer=transfer)
    played = play(program, times)

    def total(of: Mapping[tuple[Kind, int], float], actions: list[Action]) -> float:
        return sum(of[kind, stage] for kind, stage, _ in actions if kind in COMPUTE)

    busiest = max(program, key=lambda actions: total(present(times.exact), actions))
    compute, tp, cp, ep = (total(seconds, busiest) for seconds in parts)
    master_size = 8 if config.advanced.float64 else 4
    updated = max(_numbers_updated(config, layout, found) for found in rank_costs)
    return Seconds(
        compute=compute,
        tp=tp + max(link("tp", found.once, layout.tp) for found in rank_costs),
        cp=cp,
        ep=ep,
        bubble=played.makespan - compute - tp - cp - ep,
        dp=max(
            sum(
                link(axis, dp_messages(config, layout, found, program[pp]), getattr(layout, axis))
                for axis in BETWEEN_DATA_RANKS
            )
            for pp, found in enumerate(rank_costs)
        ),
        optimizer=TOUCHED * master_size * updated / cluster.bytes_per_s,
    )


def _numbers_updated(config: Config, layout: Layout, found: RankCost) -> float:
    """Numbers that a rank's optimizer updates."""
    trained, experts = (
        sum(p.tensor.numel() for p in found.params if p.tensor.requires_grad),
        _numbers_of_experts(layout, found)[1],
    )
    if config.parallel.zero_stage == 0:
        return trained
    return (trained - experts) / layout.shard + experts / layout.shards(of_expert=True)
