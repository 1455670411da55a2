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


def tree_sum_(parts: Sequence[Tensor]) -> Tensor:
    """The same in place, of as many parts as a power of two: the first one becomes the sum."""
    while len(parts) > 1:
        parts = [left.add_(right) for left, right in zip(parts[::2], parts[1::2])]
    return parts[0]


class RunningTreeSum:
    """A tree sum of parts that arrive one after another: neighbours are added as soon as both are there. If parts
    arrive in order, log2 of their number are held, besides the one that arrives."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}
        """Sums by (level of the tree, number within it)."""

    def add(self, number: int, part: Tensor) -> None:
        """Add the part with a number, which belongs to the sum from here on."""
        level = 0
        while (neighbour := self._held.pop((level, number ^ 1), None)) is not None:
            part, level, number = neighbour.add_(part), level + 1, number >> 1
        self._held[level, number] = part

    def total(self) -> Tensor:
        """The sum, when all parts have arrived."""
        (total,) = self._held.values()
        return total


Started = tuple[Tensor, "dist.Work | None", Callable[[Tensor], Tensor]]
"""The tensor that receives data, the operation to wait for, and the function that computes the result from the tensor
once it has arrived."""


def start_tree_all_reduce(x: Tensor, axis: Axis) -> Started:
    """Start the sum over the axis, of one subtree from each rank: every rank gets all of it. x belongs to it from here
    on, and may be overwritten. axis.size > 1."""
    if axis.size == 2:  # a sum of two has no order
        whole = x.contiguous()
        return whole, dist.all_reduce(whole, group=axis.group, async_op=True), lambda summed: summed
    flat = x.contiguous().view(-1)
    padded = F.pad(flat, (0, -flat.numel() % axis.size)) if flat.numel() % axis.size else flat
    slices, work, add_up = start_tree_reduce_scatter(padded, axis)

    def finish(slices: Tensor) -> Tensor:
        mine, *others = slices.chunk(axis.size)
        add_up(slices)
        for other in others:  # gloo copies what it gathers twice, and what each rank sends to all of them never
            other.copy_(mine)
        dist.all_to_all_single(padded, slices, group=axis.group)
        return padded[: x.numel()].view(x.shape)

    return slices, work, finish


def tree_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, of one subtree from each rank. May overwrite x; x itself on a single rank."""
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
    return arriving, work, lambda arriving: tree_sum_(arriving.chunk(axis.size))
