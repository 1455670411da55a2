"""Sums over logical shards in one fixed order, whoever holds them: a binary tree over the shards' numbers.

    shards 0 1 2 3 4 5 6 7 --one process--> ((0+1)+(2+3)) + ((4+5)+(6+7))
                           --two ranks----> each sums its own four, and the two sums are added: the same additions

Addition of floating-point numbers is not associative, so that a sum whose order follows the layout has other bits in
each. Ranks exchange slices, add them up as a tree and gather the sums, which sends as many bytes as a ring: 2(n-1)/n of
the tensor for n ranks. Degrees are powers of two (checks/exact.py), so that a rank's run of shards is a whole subtree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from roots_dist.world.mesh import Axis


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of equally shaped tensors, numbered from 0, or from a multiple of their number."""
    return tree_sum_of(dict(enumerate(parts)))


def tree_sum_of(parts: Mapping[int, Tensor]) -> Tensor:
    """The same for parts with their numbers; a number without a part adds nothing."""
    level = dict(parts)
    while len(level) > 1:
        above: dict[int, Tensor] = {}
        for number in sorted(level):
            left = above.get(number >> 1)
            above[number >> 1] = level[number] if left is None else left + level[number]
        level = above
    (total,) = level.values()
    return total


Started = tuple[Tensor, "dist.Work | None", Callable[[Tensor], Tensor]]
"""What arrives, when it has arrived, and what makes the result of it."""


def start_tree_all_reduce(x: Tensor, axis: Axis) -> Started:
    """Start the sum over the axis, of one subtree from each rank: every rank gets all of it. x is not changed, and must
    not be before the work is done. axis.size > 1."""
    flat = x.flatten()
    if axis.size == 2:  # to send the whole is to send as much as two halves, in one message instead of two
        both = flat.new_empty(2 * flat.numel())
        work = dist.all_gather_into_tensor(both, flat.contiguous(), group=axis.group, async_op=True)
        return both, work, lambda both: tree_sum(both.chunk(2)).view(x.shape)
    padded = F.pad(flat, (0, -flat.numel() % axis.size))

    def finish(slices: Tensor) -> Tensor:
        mine = tree_sum(slices.chunk(axis.size))
        whole = torch.empty_like(padded)
        dist.all_gather_into_tensor(whole, mine, group=axis.group)
        return whole[: x.numel()].view(x.shape)

    slices, work, _ = start_tree_reduce_scatter(padded, axis)
    return slices, work, finish


def tree_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, of one subtree from each rank, as a new tensor; x itself on a single rank."""
    if axis.size == 1:
        return x
    arriving, work, finish = start_tree_all_reduce(x, axis)
    if work is not None:
        work.wait()
    return finish(arriving)


def start_tree_reduce_scatter(parts: Tensor, axis: Axis) -> Started:
    """Start the sum over the axis of which each rank gets its own part: parts are as many equal runs of parts' first
    dimension as there are ranks. axis.size > 1."""
    arriving = torch.empty_like(parts)
    work = dist.all_to_all_single(arriving, parts, group=axis.group, async_op=True)
    return arriving, work, lambda arriving: tree_sum(arriving.chunk(axis.size))


def tree_reduce_scatter(parts: Tensor, axis: Axis) -> Tensor:
    """This rank's part of the sum over the axis."""
    arriving, work, finish = start_tree_reduce_scatter(parts, axis)
    if work is not None:
        work.wait()
    return finish(arriving)
