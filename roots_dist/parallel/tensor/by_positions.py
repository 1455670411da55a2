"""Functions of each position, with parameters, in an exact run (world/exact.py): on each run of S/(C·T) positions,
sequence parallelism or not.

    by_positions   a function of x and parameters, as a norm: the parameters' gradients are kept run by run, each on the
                   tensor rank whose run it is
    ByRow          such a function whose rows do not depend on one another: all runs at once, but for the gradients of
                   its parameters

Without `train.exact` it is the plain function. B sequences, S positions, C context shards, T tensor shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import Shard, aligned, join, laid_out, recorded, split


@dataclass(frozen=True)
class Runs:
    """The runs of positions that this rank holds, and its own among them: those from which it computes the gradients
    of parameters, a part of which each tensor rank has."""

    contexts: int = 1
    """Context shards, each of which has the same number of runs."""
    num: int = 1
    """Runs of each context shard: T, or under sequence parallelism those of this rank's positions."""
    own: range = range(1)
    """Numbers of its own ones, of each context shard."""

    @classmethod
    def of(cls, tp: TensorParallel) -> Runs:
        if tp.exact is None:
            return ALL
        first, num = (0, tp.shards) if tp.sequence_parallel else (tp.first_shard, tp.exact.tensor)
        return cls(tp.contexts, num, range(first, first + tp.shards))

    @property
    def total(self) -> int:
        return self.contexts * self.num

    def cut(self, x: Tensor) -> list[Tensor]:
        """All runs of x [B, S, ...], copied together: each as it lies in memory on a rank that has no other."""
        return self._copied(x, range(self.num))

    def cut_own(self, x: Tensor) -> list[Tensor]:
        """The same of its own runs."""
        return self._copied(x, self.own)

    def own_of(self, runs: Sequence[Tensor]) -> list[Tensor]:
        """Its own among all runs."""
        return [runs[context * self.num + number] for context in range(self.contexts) for number in self.own]

    def _copied(self, x: Tensor, which: range) -> list[Tensor]:
        if self.total == 1:
            return [x]
        if self.contexts == len(which) == 1:
            size = x.shape[1] // self.num
            return [aligned(x.narrow(1, which.start * size, size))]
        runs = x.unflatten(1, (self.contexts, self.num, -1)).movedim((1, 2), (0, 1))[:, which.start : which.stop]
        return [aligned(run) for run in runs.contiguous().flatten(0, 1).unbind()]


ALL = Runs()
"""One run of all positions."""


@dataclass(frozen=True)
class ByRow:
    """A function of each position alone, and of vectors that all positions share, with its derivatives: how many rows
    are computed together changes no bit of a row, so that runs matter only where rows are added up."""

    plain: Callable[..., Tensor]
    """The function of x and the vectors, for autograd."""
    forward: Callable[..., tuple[Tensor, ...]]
    """x and the vectors -> the output, and what backward needs, all with positions in their second dimension."""
    backward: Callable[[Runs, Tensor, Sequence[Tensor], Sequence[Tensor | None]], tuple[Tensor, list[list[Tensor]]]]
    """Runs, gradient of the output, what was kept, the vectors -> gradient of x, and of each vector one for each own
    run."""

    def __call__(self, x: Tensor, *vectors: Tensor | None) -> Tensor:
        return self.plain(x, *vectors)


def _shards_of(tp: TensorParallel, parameter: Tensor | None) -> list[Shard]:
    """The shards that receive the gradients of a parameter, one for each own run; none if it is not trained."""
    if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
        return []
    exact = present(tp.exact)
    use = exact.use_of(parameter)
    return [Shard(exact, parameter, part=part, use=use, context=context) for context, part in _numbers(tp)]


def _numbers(tp: TensorParallel) -> Iterator[tuple[int, int]]:
    """The number of its context shard and its number there, for each of this rank's own runs."""
    return product(range(tp.contexts), range(tp.shards))


class _ByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: ByRow, runs: Runs, shards: Sequence[Sequence[Shard]], x: Tensor, *vectors: Tensor | None
    ) -> Tensor:
        out, *kept = f.forward(x, *vectors)
        ctx.f, ctx.runs, ctx.shards, ctx.vectors = f, runs, shards, len(vectors)
        ctx.save_for_backward(*vectors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        vectors, kept = saved[: ctx.vectors], saved[ctx.vectors :]
        grad_x, of_vectors = ctx.f.backward(ctx.runs, laid_out(grad), kept, vectors)
        for shards, of_runs in zip(ctx.shards, of_vectors):
            for shard, of_run in zip(shards, of_runs):
                shard.grad.add_(of_run)
        return None, None, None, grad_x, *(None,) * ctx.vectors


def _add_backward(
    runs: Runs, grad: Tensor, kept: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> tuple[Tensor, list[list[Tensor]]]:
    return grad, [[run.flatten(0, -2).sum(0) for run in runs.cut_own(grad)]]


ADD = ByRow(torch.add, lambda x, vector: (x + vector,), _add_backward)
"""x [B, S, D] + a vector [D]."""


def _for_each_run(tp: TensorParallel, runs: Runs, parameter: nn.Parameter) -> list[Tensor]:
    """The parameter for each run that this rank holds. From those that are not its own, another computes gradients."""
    found: list[Tensor] = [parameter.detach()] * runs.total
    for context, part in _numbers(tp):
        found[context * runs.num + runs.own[part]] = recorded(tp, parameter, part, context)
    return found


def by_positions(tp: TensorParallel, f: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """f(x, *others) for functions of each position of x [B, s, ...] alone; others are parameters, and tensors of the
    same positions. A length that T does not divide, of text that is being generated, is not cut."""
    runs = Runs.of(tp)
    num = runs.total
    if num == 1 or x.shape[1] % num:
        return f(x, *(recorded(tp, other, 0) if isinstance(other, nn.Parameter) else other for other in others))
    if isinstance(f, ByRow):
        shards = [_shards_of(tp, other) for other in others]
        out: Tensor = _ByRow.apply(  # type: ignore[no-untyped-call] # torch types no apply
            f, runs, shards, x, *others
        )
        return out

    def of_runs(other: Tensor | None) -> Sequence[Tensor | None]:
        if isinstance(other, nn.Parameter):
            return _for_each_run(tp, runs, other)
        return [None] * num if other is None else split(other, num, 1)

    return join([f(*run) for run in zip(split(x, num, 1), *map(of_runs, others))], 1)
