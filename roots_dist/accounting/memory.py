"""Bytes that a rank holds between two steps, by arithmetic: weights, gradients, master weights and moments.

    parameters of a rank + engine + ZeRO stage --rank_state--> RankState: checks before a start, bounds, the plan

What DeepSpeed holds was measured (tests/parity/test_plan.py compares it with running ranks).
"""

from __future__ import annotations

from typing import NamedTuple

from roots_dist.accounting.sizes import expert_parameters, parameters
from roots_dist.config.schema import Config
from roots_dist.layout import Layout

GIB = 2**30


class RankState(NamedTuple):
    """Bytes of one rank."""

    weights: int
    gradients: int
    """Bytes of its share of the reduced gradients."""
    optimizer: int
    """Master weights and both moments of AdamW."""
    buffers: int
    """Communication buffers of the engine."""


def rank_state(
    config: Config, layout: Layout, parameters: int, trainable: int, experts: int = 0, trained_experts: int = 0
) -> RankState:
    """State of a rank that holds `parameters` parameters, of which `trainable` are trained; `experts` and
    `trained_experts` of these are cut over parallel.ep, so that fewer ranks hold the same."""
    zero, dp = config.parallel.zero_stage, layout.shard
    wide = 8 if config.advanced.float64 else 4
    element = 2 if config.train.precision == "bf16" and not config.advanced.float64 else wide
    gradient = max(element, 2 if config.advanced.grad_dtype == "bf16" else 4)
    if config.advanced.engine == "reference" or zero == 0:
        copy = wide if element < wide else 0  # else the weights are their own masters
        weights = gradients = optimizer = 0
        for held, learning, holders in (
            (parameters - experts, trainable - trained_experts, dp),
            (experts, trained_experts, layout.shards(of_expert=True)),
        ):
            weights += held * element // (holders if zero >= 3 else 1)
            gradients += learning * gradient // (holders if zero >= 2 else 1)
            optimizer += learning * (2 * wide + copy) // (holders if zero >= 1 else 1)
        return RankState(weights, gradients, optimizer, 0)
    return RankState(
        weights=parameters * element // (dp if zero >= 3 else 1),
        gradients=trainable * gradient // (dp if zero >= 2 else 1),
        optimizer=trainable * 3 * wide // dp,  # DeepSpeed keeps master weights in full precision too
        buffers=min(config.advanced.reduce_bucket, trainable) * element,
    )


def state_bytes(config: Config, layout: Layout, *, all_learns: bool = True) -> int:
    """The least number of bytes that a rank holds between two steps, while the whole model learns. With
    all_learns=False only a part learns, which is not known here: it counts as frozen too, with weights and nothing
    else.

    Activations and buffers are left out and all parts are shared evenly, so a run that does not fit this bound cannot
    run.
    """
    mine, experts = shares(config, layout)
    learning = (mine, experts) if all_learns else (0, 0)
    weights, gradients, optimizer, _ = rank_state(config, layout, mine, learning[0], experts, learning[1])
    return weights + gradients + optimizer


def shares(config: Config, layout: Layout) -> tuple[int, int]:
    """Number of parameters of a rank, if all parts are shared evenly, and how many of these parallel.ep cuts."""
    cut = expert_parameters(config) if layout.ep > 1 else 0
    model = layout.tp * layout.pp
    return (parameters(config) - cut) // model + cut // (model * layout.ep), cut // (model * layout.ep)


def save_copy_bytes(
    config: Config, layout: Layout, parameters: int, trainable: int, experts: int = 0, trained_experts: int = 0
) -> int:
    """Host memory in which a rank has its part of a checkpoint while training goes on, from the first one on: master
    weights and moments, in equal parts on all ranks that hold the same. 0 if training waits for its checkpoints. The
    numbers are those of `rank_state`."""
    if not config.saves_in_background():
        return 0
    wide = 8 if config.advanced.float64 else 4
    common, cut = parameters - experts + 2 * (trainable - trained_experts), experts + 2 * trained_experts
    return wide * common // layout.dp_cp + wide * cut // layout.edp
