"""Messages between data ranks of the built-in engine: gradients are summed, weights gathered. Sums in a fixed order are
those of world/tree_sum.py.

    start_all_reduce      every rank has the whole sum         ZeRO 0
    start_reduce_scatter  each rank has its part of the sum    ZeRO 1 to 3
    start_all_gather      every rank has all parts             weights of ZeRO 1 to 3, and state that is saved

They start a message and return; its tensors must be left alone until PendingMessage.wait. All ranks of the axis call
the same ones in the same order. An axis of size 1 sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from roots_dist.world.mesh import Axis


@dataclass(frozen=True)
class PendingMessage:
    """A message under way. Holds the tensor that is sent, which must live until then."""

    work: dist.Work | None
    sent: Tensor
    result: Tensor
    add_up: Callable[[Tensor], Tensor] = lambda summed: summed
    """Function that computes the result from what has arrived; a sum in a fixed order sends its second half there."""

    def wait(self) -> Tensor:
        """The result, once it has arrived. On a GPU the stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.add_up(self.result)


def start_all_reduce(whole: Tensor, axis: Axis) -> PendingMessage:
    """Sum over the axis, in place."""
    work = dist.all_reduce(whole, group=axis.group, async_op=True) if axis.size > 1 else None
    return PendingMessage(work, whole, whole)


def start_reduce_scatter(whole: Tensor, axis: Axis) -> PendingMessage:
    """[n · size] -> [n]: this rank's part of the sum over the axis."""
    if axis.size == 1:
        return PendingMessage(None, whole, whole)
    part = whole.new_empty(whole.numel() // axis.size)
    return PendingMessage(dist.reduce_scatter_tensor(part, whole, group=axis.group, async_op=True), whole, part)


def start_all_gather(whole: Tensor, part: Tensor, axis: Axis) -> PendingMessage:
    """[n] -> [n · size], written to `whole`, of which `part` may be this rank's own slice."""
    if axis.size == 1:
        return PendingMessage(None, part, whole.copy_(part))
    return PendingMessage(dist.all_gather_into_tensor(whole, part, group=axis.group, async_op=True), part, whole)
