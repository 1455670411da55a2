"""Layers of an exact run (world/exact.py): the same operations on the same logical shards in every layout.

    by_shards      a function of channels, as an activation, on each tensor shard of this rank
    by_positions   a function with parameters, as a norm, on each run of S/T positions, sequence parallelism or not
    ByRow          such a function whose rows do not depend on one another: all runs at once, but for the gradients of
                   its parameters
    recorded       a parameter whose gradient is kept apart by part and use
    spread         a region's input, once for each tensor shard of this rank; their gradients are added as a tree

Shapes are fixed with the shards, because a vectorized kernel ends in another instruction where a length is odd. Without
`train.exact` all of these are the plain thing. B sequences, S positions, T tensor shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.parallel.tensor.collectives import TensorParallel, copy_to_tp_region, reduce_from_tp_region
from roots_dist.world.exact import Exact
from roots_dist.world.mesh import SINGLE
from roots_dist.world.tree_sum import tree_sum

ALIGNMENT = 64
"""Bytes to which torch aligns a tensor of its own; kernels may depend on it."""


@dataclass(frozen=True, eq=False)
class Shard:
    """One tensor shard of this rank's slice of a parameter."""

    exact: Exact
    parameter: nn.Parameter
    index: tuple[slice, ...] = (slice(None),)
    part: int = 0
    """Which part of the gradient it gives, if several shards use the same slice."""
    use: int | None = None

    def values(self) -> Tensor:
        """The shard as a tensor of its own shape: laid out in memory as it is on a rank that holds nothing else."""
        return aligned(self.parameter[self.index])

    @property
    def grad(self) -> Tensor:
        """What its gradient is added to, in place."""
        return self.exact.gradient(self.parameter, self.part, self.use)[self.index]

    def recorded(self) -> Tensor:
        """Its values for autograd, which adds their gradient to `grad`."""
        values = self.values()
        if not self.parameter.requires_grad:
            return values
        made: Tensor = _Recorded.apply(values, self)  # type: ignore[no-untyped-call] # torch types no apply
        return made


def aligned(x: Tensor) -> Tensor:
    """x itself, or a copy if it does not lie in memory as a tensor of its own would."""
    if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num: int, dim: int, lying: torch.memory_format) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return tuple(part.clone(memory_format=lying) for part in x.chunk(num, dim))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.cat(grads, ctx.dim), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, lying: torch.memory_format, *parts: Tensor) -> Tensor:
        ctx.num, ctx.dim, ctx.lying = len(parts), dim, lying
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = grad.chunk(ctx.num, ctx.dim)
        return None, None, *(part.clone(memory_format=ctx.lying) for part in parts)


def split(
    x: Tensor, num: int, dim: int = -1, lying: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, ...]:
    """Equal parts of x as tensors of their own, whose gradients are joined as such."""
    parts: tuple[Tensor, ...] = _Split.apply(x, num, dim, lying)  # type: ignore[no-untyped-call] # torch types no apply
    return parts


def join(parts: Sequence[Tensor], dim: int = -1, lying: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The inverse of split."""
    whole: Tensor = _Join.apply(dim, lying, *parts)  # type: ignore[no-untyped-call] # torch types no apply
    return whole


def heads_of_shards(tp: TensorParallel, *xs: Tensor) -> list[tuple[Tensor, ...]]:
    """Each x [B, h, S, K] cut into the heads of this rank's tensor shards, which lie in memory as x does: with its
    dimensions in the same order, of which kernels' sums may depend."""
    return list(zip(*(split(x, tp.shards, 1, torch.preserve_format) for x in xs)))


def join_heads(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of heads_of_shards, for one x."""
    return join(parts, 1, torch.preserve_format)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(num))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return tree_sum(grads), None


def spread(x: Tensor, tp: TensorParallel) -> tuple[Tensor, ...]:
    """x, which lies inside a region, for each tensor shard of this rank."""
    made: tuple[Tensor, ...] = _Spread.apply(x, tp.shards)  # type: ignore[no-untyped-call] # torch types no apply
    return made


def _runs_of(tp: TensorParallel, parameter: Tensor | None, num: int) -> list[Shard]:
    """Where the gradients of a parameter's runs of positions are added; nowhere if it is not trained."""
    if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
        return []
    exact = present(tp.exact)
    use = exact.use_of(parameter)
    return [Shard(exact, parameter, part=part, use=use) for part in range(num)]


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.shard.grad.add_(grad)
        return None, None


def kept_shard(tp: TensorParallel, parameter: Tensor) -> Shard | None:
    """Where the gradient of a parameter's present use is to be added, if others give it one too; None if it is the only
    one."""
    if tp.exact is None or not isinstance(parameter, nn.Parameter):
        return None
    use = tp.exact.use_of(parameter)
    return None if use is None else Shard(tp.exact, parameter, use=use)


def recorded(tp: TensorParallel, parameter: nn.Parameter, part: int | None = None) -> Tensor:
    """The parameter, whose gradient here is kept apart if it is one of several: of parts, or of uses by pieces."""
    if tp.exact is None or not parameter.requires_grad:
        return parameter
    use = tp.exact.use_of(parameter)
    if part is None and use is None:
        return parameter
    shard = Shard(tp.exact, parameter, part=part or 0, use=use)
    made: Tensor = _Recorded.apply(parameter, shard)  # type: ignore[no-untyped-call] # torch types no apply
    return made


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def contiguous_gradient(x: Tensor) -> Tensor:
    """x, whose gradient is laid out in memory as a tensor of its own: products read it so in every layout."""
    made: Tensor = _ContiguousGradient.apply(x)  # type: ignore[no-untyped-call] # torch types no apply
    return made


def by_shards(tp: TensorParallel, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """f(*xs) for functions of each channel alone, channels in the last dimension."""
    if tp.shards == 1:
        return f(*xs)
    return join([f(*parts) for parts in zip(*(split(x, tp.shards) for x in xs))])


def by_heads(tp: TensorParallel, f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: nn.Parameter) -> Tensor:
    """f(x, weight) for functions of each head of x [B, h, S, K] alone, with one weight for all heads."""
    if tp.exact is None:
        return f(x, weight)
    heads = split(x, tp.shards, 1)  # of one shard too: a sum's order follows the strides
    return join([f(part, recorded(tp, weight, number)) for number, part in enumerate(heads)], 1)


Cut = Callable[[Tensor], list[Tensor]]
"""What cuts a tensor [B, S, ...] into its runs of positions."""


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
        grad_x, of_vectors = ctx.f.backward(partial(_runs, ctx.num), grad.contiguous(), kept, vectors)
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
    num = tp.position_runs
    if num == 1 or x.shape[1] % num:
        return f(x, *(recorded(tp, other, 0) if isinstance(other, nn.Parameter) else other for other in others))
    if isinstance(f, ByRow):
        shards = [_runs_of(tp, other, num) for other in others]
        out: Tensor = _ByRow.apply(f, num, shards, x, *others)  # type: ignore[no-untyped-call] # torch types no apply
        return out

    def of_runs(other: Tensor | None) -> Sequence[Tensor | None]:
        if isinstance(other, nn.Parameter):
            return [recorded(tp, other, part) for part in range(num)]
        return [None] * num if other is None else split(other, num, 1)

    return join([f(*run) for run in zip(split(x, num, 1), *map(of_runs, others))], 1)


def row_shard(tp: TensorParallel, parameter: nn.Parameter | None, parts: int | None, number: int) -> Shard | None:
    """The rows of one of this rank's tensor shards. parts: the most slices that they can be cut into; with fewer than
    shards, neighbours share one."""
    if parameter is None:
        return None
    exact = present(tp.exact)
    slices = min(exact.tensor, parts or exact.tensor)
    first = tp.first_shard * slices // exact.tensor
    held = -(-tp.shards * slices // exact.tensor)
    which, part = divmod((tp.first_shard + number) * slices, exact.tensor)
    size = parameter.shape[0] // held
    return Shard(exact, parameter, (slice((which - first) * size, (which - first + 1) * size),), part // slices)


Owned = tuple[nn.Parameter | None, int | None]
"""A parameter, or none, and the most slices that its rows can be cut into, as in row_shard."""


def columns_of_shards(
    compute: Callable[..., tuple[Tensor, ...]],
    tp: TensorParallel,
    xs: Sequence[Tensor],
    reads: Sequence[int],
    owned: Sequence[Owned],
    others: Sequence[Owned],
    finish: Callable[[tuple[Tensor, ...], Sequence[Tensor]], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Column-parallel layers (linear.py) shard by shard. owned: weights and then biases. finish: makes the outputs of
    what the layers compute, and of the shards of `others`. What shards have in common (key/value heads) is in the
    outputs once for each."""
    alone, made = replace(tp, axis=SINGLE, sequence_parallel=False), list[tuple[Tensor, ...]]()
    for number, copies in enumerate(zip(*(spread(copy_to_tp_region(x, tp), tp) for x in xs))):
        mine, more = ([row_shard(tp, p, parts, number) for p, parts in of] for of in (owned, others))
        outputs = compute(alone, reads, mine, None, *copies, *(shard and shard.values() for shard in mine))
        made.append(finish(outputs, [present(shard).recorded() for shard in more]))
    return tuple(map(join, zip(*made)))


def rows_of_shards(
    compute: Callable[..., tuple[Tensor, ...]], tp: TensorParallel, x: Tensor, weights: Sequence[nn.Parameter]
) -> tuple[Tensor, ...]:
    """A row-parallel layer's products (linear.py) with x [B, S, f] shard by shard, each summed over all of them."""
    alone, size = replace(tp, axis=SINGLE, sequence_parallel=False), x.shape[-1] // tp.shards
    products: list[tuple[Tensor, ...]] = []
    for number, channels in enumerate(split(x, tp.shards)):
        columns = (slice(None), slice(number * size, (number + 1) * size))
        shards = [Shard(present(tp.exact), weight, columns) for weight in weights]
        values = [shard.values() for shard in shards]
        products.append(compute(alone, None, len(shards), shards, *values, channels))
    return tuple(reduce_from_tp_region(tree_sum(of_weight), tp) for of_weight in zip(*products))
