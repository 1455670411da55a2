"""Attention over the positions of several context ranks, in one of two ways (parallel.cp_kind).

    gather  k, v [2, B, g, L, K] --all-gather, put in order--> [2, B, g, S, K], for this rank's queries
            its gradient         <--reduce-scatter, sum------- gradient, of this rank's queries
    heads   q, k, v [B, h, L, K] --all-to-all----------------> [B, h/cp, S, K]
            output               <--all-to-all---------------- [B, h/cp, S, K], and the same for gradients

When keys and values are gathered, only this rank's are kept between forward and backward: what backward needs of the
others is gathered again. B sequences, S positions, L = S/cp positions of this rank (world/positions.py), h heads of any
kind, g key/value heads, K head width. Head exchange is Ulysses (Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from roots_dist.errors import present
from roots_dist.parallel.tensor.collectives import TensorParallel


def _in_order(every: Tensor) -> Tensor:
    """[cp, ..., L, K] of all ranks -> [..., S, K]: each rank's first halves, then its second halves back."""
    early, late = every.chunk(2, -2)
    return torch.cat([*early, *late.flip(0)], -2)


def _cut(whole: Tensor, size: int) -> Tensor:
    """[..., S, K] -> [cp, ..., L, K]: the positions of each rank."""
    chunks = whole.chunk(2 * size, -2)
    return torch.stack([torch.cat([chunks[rank], chunks[-1 - rank]], -2) for rank in range(size)])


def _start_gather(x: Tensor, tp: TensorParallel) -> Callable[[], Tensor]:
    """[..., L, K] -> [..., S, K], in the order of positions, once what this returns is called."""
    mine, every = x.contiguous(), x.new_empty(tp.cp.size, *x.shape)
    work = dist.all_gather_into_tensor(every.flatten(0, 1), mine, group=tp.cp.group, async_op=True)

    def finish() -> Tensor:
        tp.watch.lap("compute")
        present(work).wait()
        tp.watch.lap("cp")
        return _in_order(every)

    return finish


def _sum_and_cut(whole: Tensor, tp: TensorParallel) -> Tensor:
    """[..., S, K] -> [..., L, K]: this rank's positions of the sum over context ranks."""
    parts = _cut(whole, tp.cp.size)
    mine = torch.empty_like(parts[0])
    tp.watch.lap("compute")
    dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=tp.cp.group)
    tp.watch.lap("cp")
    return mine


def _exchange(parts: Tensor, tp: TensorParallel) -> Tensor:
    """[cp, ...]: one part for each context rank -> [cp, ...]: one part from each."""
    found = torch.empty_like(parts, memory_format=torch.contiguous_format)
    tp.watch.lap("compute")
    dist.all_to_all_single(found, parts.contiguous(), group=tp.cp.group)
    tp.watch.lap("cp")
    return found


def _heads_for_positions(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h, L, K] -> [..., h/cp, S, K]"""
    return _in_order(_exchange(x.unflatten(-3, (tp.cp.size, -1)).movedim(-4, 0), tp))


def _positions_for_heads(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h/cp, S, K] -> [..., h, L, K]"""
    return _exchange(_cut(x, tp.cp.size), tp).movedim(0, -4).flatten(-4, -3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _heads_for_positions(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _positions_for_heads(grad, ctx.tp), None


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _positions_for_heads(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _heads_for_positions(grad, ctx.tp), None


def to_heads(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h, L, K] of this rank's positions -> [..., h/cp, S, K] of all positions."""
    return _ToHeads.apply(x, tp)  # type: ignore[no-any-return,no-untyped-call] # torch types no apply


def to_positions(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h/cp, S, K] of all positions -> [..., h, L, K] of this rank's positions."""
    return _ToPositions.apply(x, tp)  # type: ignore[no-any-return,no-untyped-call] # torch types no apply


class Gather:
    """Keys and values of one layer and microbatch on their way to all context ranks: begun before they are needed, in
    forward by who has them first, in backward when the gradient of the layer's output arrives."""

    def __init__(self, tp: TensorParallel) -> None:
        self._tp = tp
        self._coming: Callable[[], Tensor] | None = None
        self._again: Tensor | None = None
        self.later: Callable[[], None] | None = None
        """Begins to gather again, for backward; None if backward does not need it."""

    def start(self, mine: Tensor) -> None:
        self._coming = _start_gather(mine, self._tp)

    def finish(self, mine: Tensor) -> Tensor:
        """[..., L, K] -> [..., S, K]"""
        coming, self._coming = self._coming, None
        return (coming or _start_gather(mine, self._tp))()

    def finish_again(self, mine: Tensor) -> Tensor:
        """The same in backward, for all who ask there."""
        if self._again is None:
            self._again = self.finish(mine)
        return self._again

    def forget(self) -> None:
        """Drop what finish_again has kept."""
        self._again = self.later = None


class _GatherPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, gather: Gather) -> Tensor:
        ctx.tp, ctx.gather = tp, gather
        return gather.finish(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.gather.forget()  # nobody needs it any longer
        return _sum_and_cut(grad, ctx.tp), None, None


@contextmanager
def gathered(x: Tensor, tp: TensorParallel, gather: Gather, *, saved: bool = False) -> Iterator[Tensor]:
    """Inside, the whole of x [..., L, K]: [..., S, K]. Collective over context ranks, and again in backward.

    What is saved for backward inside is kept as it is, except for views of the whole: of these only the shape is kept,
    and the first that backward asks for gathers x again. saved: they are kept too, because their memory is short-lived
    anyway (recomputation). If something is to be gathered again, gather.later begins before backward asks.
    """
    whole: Tensor = _GatherPositions.apply(x, tp, gather)  # type: ignore[no-untyped-call] # torch types no apply
    if saved or not whole.requires_grad:
        yield whole
        return
    storage, mine = whole.untyped_storage()._cdata, x.detach()

    def pack(tensor: Tensor) -> Tensor | tuple[tuple[int, ...], tuple[int, ...], int]:
        if tensor.untyped_storage()._cdata != storage:
            return tensor.detach()
        gather.later = lambda: gather.start(mine)
        return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())

    def unpack(kept: Tensor | tuple[tuple[int, ...], tuple[int, ...], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return gather.finish_again(mine).as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        yield whole
