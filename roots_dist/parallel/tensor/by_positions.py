"""Functions of each position, with parameters, in an exact run (world/exact.py): on each run of S/(C·T) positions,
sequence parallelism or not.

    by_positions   a function of x and parameters, as a norm: the parameters' gradients are kept run by run
    ByRow          such a function whose rows do not depend on one another: all runs at once, but for the gradients of
                   its parameters

Without `train.exact` it is the plain function. B sequences, S positions, C context shards, T tensor shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import Shard, aligned, join, laid_out, recorded, split

Cut = Callable[[Tensor], list[Tensor]]
"""Function that cuts a tensor [B, S, ...] into its runs of positions."""


@dataclass(frozen=True)
class ByRow:
    """A function of each position alone, and of vectors that all positions share, with its derivatives: how many rows
    are computed together changes no bit of a row, so that runs matter only where rows are added up."""

    plain: Callable[..., Tensor]
    """The function of x and the vectors, for autograd."""
    forward: Callable[..., tuple[Tensor, ...]]
    """x and the vectors -> the output, and what backward needs, all with positions in their second dimension."""
    backward: Callable[[Cut, Tensor, Sequence[Tensor], Sequence[Tensor | None]], tuple[Tensor, list[list[Tensor]]]]
    """cut, gradient of the output, what was kept, the vectors -> gradient of x, and of each vector one for each run."""

    def __call__(self, x: Tensor, *vectors: Tensor | None) -> Tensor:
        return self.plain(x, *vectors)


def _runs_of(tp: TensorParallel, parameter: Tensor | None) -> list[Shard]:
    """The shards that receive the gradients of a parameter, one per run of positions; none if it is not trained."""
    if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
        return []
    exact = present(tp.exact)
    use = exact.use_of(parameter)
    return [Shard(exact, parameter, part=part, use=use, context=context) for context, part in _numbers(tp)]


def _numbers(tp: TensorParallel) -> Iterator[tuple[int, int]]:
    """The number of its context shard and its own number there, for each run of positions of this rank."""
    return product(range(tp.contexts), range(tp.position_runs))


def _runs(num: int, x: Tensor) -> list[Tensor]:
    """Runs of positions of x [B, S, ...], copied together: each as it lies in memory on a rank that has no other."""
    together = x.unflatten(1, (num, -1)).transpose(0, 1).contiguous()
    return [aligned(run) for run in together.unbind()]


class _ByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: ByRow, num: int, shards: Sequence[Sequence[Shard]], x: Tensor, *vectors: Tensor | None
    ) -> Tensor:
        out, *kept = f.forward(x, *vectors)
        ctx.f, ctx.num, ctx.shards, ctx.vectors = f, num, shards, len(vectors)
        ctx.save_for_backward(*vectors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        vectors, kept = saved[: ctx.vectors], saved[ctx.vectors :]
        grad_x, of_vectors = ctx.f.backward(partial(_runs, ctx.num), laid_out(grad), kept, vectors)
        for shards, of_runs in zip(ctx.shards, of_vectors):
            for shard, of_run in zip(shards, of_runs):
                shard.grad.add_(of_run)
        return None, None, None, grad_x, *(None,) * ctx.vectors


def _add_backward(
    cut: Cut, grad: Tensor, kept: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> tuple[Tensor, list[list[Tensor]]]:
    return grad, [[run.flatten(0, -2).sum(0) for run in cut(grad)]]


ADD = ByRow(torch.add, lambda x, vector: (x + vector,), _add_backward)
"""x [B, S, D] + a vector [D]."""


def by_positions(tp: TensorParallel, f: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """f(x, *others) for functions of each position of x [B, s, ...] alone; others are parameters, and tensors of the
    same positions. A length that T does not divide, of text that is being generated, is not cut."""
    num = tp.contexts * tp.position_runs
    if num == 1 or x.shape[1] % num:
        return f(x, *(recorded(tp, other, 0) if isinstance(other, nn.Parameter) else other for other in others))
    if isinstance(f, ByRow):
        shards = [_runs_of(tp, other) for other in others]
        out: Tensor = _ByRow.apply(f, num, shards, x, *others)  # type: ignore[no-untyped-call] # torch types no apply
        return out

    def of_runs(other: Tensor | None) -> Sequence[Tensor | None]:
        if isinstance(other, nn.Parameter):
            return [recorded(tp, other, part, context) for context, part in _numbers(tp)]
        return [None] * num if other is None else split(other, num, 1)

    return join([f(*run) for run in zip(split(x, num, 1), *map(of_runs, others))], 1)
