"""The messages of a step between data ranks, by arithmetic over a rank's parameters."""

from __future__ import annotations

from collections.abc import Sequence

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.layout import AxisName, Layout
from roots_dist.runs.plan.passes import Message
from roots_dist.runs.plan.rank_cost import RankCost
from roots_dist.schedule.actions import Action, Kind
from roots_dist.schedule.communication import COMPUTE
from roots_dist.world.sharding import Param

BETWEEN_HOLDERS: tuple[AxisName, ...] = ("dp_cp", "edp")
"""Axes of ranks that hold the same parameters; the second one, of experts that parallel.ep cuts."""
BETWEEN_DATA_RANKS: tuple[AxisName, ...] = (*BETWEEN_HOLDERS, "shard", "replica")
"""Axes of messages between data ranks; the last two where ZeRO shards over some of them."""


def dp_messages(config: Config, layout: Layout, found: RankCost, actions: list[Action]) -> list[Message]:
    """Messages between data ranks in a step: gradients are reduced, by ZeRO-2 and 3 in each backward pass unless
    DeepSpeed does it or the run is exact; weights are gathered, by ZeRO-3 in each pass."""
    passes = sum(kind in COMPUTE and kind is not Kind.WEIGHT for kind, _, _ in actions) // len(found.stages)
    cut = [layout.ep > 1 and p.spec.of_expert for p in found.params]
    return [
        message
        for axis, of_experts in zip(BETWEEN_HOLDERS, (False, True))
        if getattr(layout, axis) > 1 and of_experts in cut
        for message in _messages_of_holders(
            config, layout, axis, [p for p, is_cut in zip(found.params, cut) if is_cut == of_experts], passes
        )
    ]


def _messages_of_holders(
    config: Config, layout: Layout, axis: AxisName, params: Sequence[Param], passes: int
) -> list[Message]:
    """The messages of a step between the ranks of `axis`, which hold these parameters."""
    trained = [p.tensor for p in params if p.tensor.requires_grad]
    gradients = sum(tensor.numel() * present(tensor.grad_dtype).itemsize for tensor in trained)
    updated, weights = sum(tensor.nbytes for tensor in trained), sum(p.tensor.nbytes for p in params)
    if config.parallel.zero_stage == 0:
        return [Message("all_reduce", gradients, axis)]
    over = [Message("all_reduce", gradients // layout.shard, "replica")] if layout.replica > 1 else []
    axis = "shard" if over else axis
    summed = Message("reduce_scatter", gradients, axis)
    in_passes = config.parallel.zero_stage >= 2 and config.advanced.engine == "reference" and config.train.exact is None
    times = passes // 2 if in_passes else 1
    if config.parallel.zero_stage < 3:
        return [*[summed] * times, *over, Message("all_gather", updated, axis)]
    return [*[summed] * times, *over, *[Message("all_gather", weights, axis)] * passes]
