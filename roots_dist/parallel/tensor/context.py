"""Keys and values of the whole sequence on every context rank: gathered in forward, their gradients summed in backward.

    this rank's k, v [2, B, g, L, K] --all-gather, put in order--> [2, B, g, S, K]
    its gradient                     <--reduce-scatter, sum------- gradient, of this rank's queries

Between forward and backward only this rank's keys and values are kept: what backward needs of the others is gathered
again. B sequences, S positions, L = S/cp positions of this rank (world/positions.py), g key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from roots_dist.parallel.tensor.collectives import TensorParallel


def _gather(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., L, K] -> [..., S, K], in the order of positions: each rank's first halves, then its second halves back."""
    every = x.new_empty(tp.cp.size, *x.shape)
    tp.watch.lap("compute")
    dist.all_gather_into_tensor(every.flatten(0, 1), x.contiguous(), group=tp.cp.group)
    tp.watch.lap("cp")
    early, late = every.chunk(2, -2)
    return torch.cat([*early, *late.flip(0)], -2)


def _sum_and_cut(whole: Tensor, tp: TensorParallel) -> Tensor:
    """[..., S, K] -> [..., L, K]: this rank's positions of the sum over context ranks."""
    chunks = whole.chunk(2 * tp.cp.size, -2)
    parts = torch.stack([torch.cat([chunks[rank], chunks[-1 - rank]], -2) for rank in range(tp.cp.size)])
    mine = torch.empty_like(parts[0])
    tp.watch.lap("compute")
    dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=tp.cp.group)
    tp.watch.lap("cp")
    return mine


class _GatherPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, again: list[Tensor]) -> Tensor:
        ctx.tp, ctx.again = tp, again
        return _gather(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.again.clear()  # nobody needs it any longer
        return _sum_and_cut(grad, ctx.tp), None, None


@contextmanager
def gathered(x: Tensor, tp: TensorParallel, *, saved: bool = False) -> Iterator[Tensor]:
    """Inside, the whole of x [..., L, K]: [..., S, K]. Collective over context ranks, and again in backward.

    What is saved for backward inside is kept as it is, except for views of the whole: of these only the shape is kept,
    and the first that backward asks for gathers x again. saved: they are kept too, because their memory is short-lived
    anyway (recomputation).
    """
    again: list[Tensor] = []
    whole: Tensor = _GatherPositions.apply(x, tp, again)  # type: ignore[no-untyped-call] # torch types no apply
    if saved or not whole.requires_grad:
        yield whole
        return
    storage, mine = whole.untyped_storage()._cdata, x.detach()

    def pack(tensor: Tensor) -> Tensor | tuple[tuple[int, ...], tuple[int, ...], int]:
        if tensor.untyped_storage()._cdata != storage:
            return tensor.detach()
        return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())

    def unpack(kept: Tensor | tuple[tuple[int, ...], tuple[int, ...], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not again:
            again.append(_gather(mine, tp))
        return again[0].as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        yield whole
