"""Layers of an exact run (world/exact.py): the same operations on the same logical shards in every layout.

    by_shards      a function of channels, as an activation, on each tensor shard of this rank
    by_positions   a function with parameters, as a norm, on each run of positions (by_positions.py)
    recorded       a parameter whose gradient is kept apart by context shard, part and use
    spread         a region's input, once for each tensor shard of this rank; their gradients are added as a tree
    RegionShard    one of the shards of a region whose whole computation is done shard by shard, as a mixture of experts

Shapes are fixed with the shards, because a vectorized kernel ends in another instruction where a length is odd. Without
`train.exact` all of these are the plain thing. B sequences, S positions, T tensor shards, C context shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.parallel.tensor.collectives import TensorParallel, copy_to_tp_region, reduce_from_tp_region
from roots_dist.world.exact import Exact
from roots_dist.world.mesh import SINGLE
from roots_dist.world.sharding import spec_of
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
    """Number of the part of the gradient that this shard gives, if several shards use the same slice."""
    use: int | None = None
    context: int = 0
    """The context shard that gives it, among those of this rank."""
    sender: int = 0
    """The rank of ep whose tokens give it, if other ranks send some."""

    @property
    def view(self) -> Tensor:
        """The shard where it lies in the parameter."""
        return self.parameter[self.index]

    def values(self) -> Tensor:
        """The shard as a tensor of its own shape: laid out in memory as it is on a rank that holds nothing else."""
        return aligned(self.view)

    @property
    def grad(self) -> Tensor:
        """The tensor to which its gradient is added in place."""
        return self.exact.gradient(self.parameter, self.part, self.use, self.context, self.sender)[self.index]

    def recorded(self) -> Tensor:
        """Its values for autograd, which adds their gradient to `grad`."""
        values = self.values()
        if not self.parameter.requires_grad:
            return values
        made: Tensor = _Recorded.apply(values, self)  # type: ignore[no-untyped-call] # torch types no apply
        return made


def aligned(x: Tensor) -> Tensor:
    """x itself, or a copy if it does not lie in memory as a tensor of its own would."""
    if x.is_contiguous() and begins_aligned(x):
        return laid_out(x)
    return x.clone(memory_format=torch.contiguous_format)


def begins_aligned(x: Tensor) -> bool:
    return x.data_ptr() % ALIGNMENT == 0


def laid_out(x: Tensor) -> Tensor:
    """x with the strides of a tensor of its own: a kernel is chosen, and a sum ordered, by them. A dimension of size 1
    may have any stride in a contiguous tensor, and a product with a frozen matrix reads it."""
    if x.is_contiguous() and 1 not in x.shape:
        return x
    return x.contiguous().view(x.shape)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], dim: int, lying: torch.memory_format) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return tuple(part.clone(memory_format=lying) for part in x.split(list(sizes), dim))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.cat(grads, ctx.dim), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, lying: torch.memory_format, *parts: Tensor) -> Tensor:
        ctx.sizes, ctx.dim, ctx.lying = [part.shape[dim] for part in parts], dim, lying
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = grad.split(ctx.sizes, ctx.dim)
        return None, None, *(part.clone(memory_format=ctx.lying) for part in parts)


def split(
    x: Tensor, into: int | Sequence[int], dim: int = -1, lying: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, ...]:
    """Equal parts of x, or parts of these sizes, as tensors of their own, whose gradients are joined as such."""
    sizes = [x.shape[dim] // into] * into if isinstance(into, int) else into
    parts: tuple[Tensor, ...] = _Split.apply(x, sizes, dim, lying)  # type: ignore[no-untyped-call] # torch types no apply
    return parts


def join(parts: Sequence[Tensor], dim: int = -1, lying: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The inverse of split."""
    whole: Tensor = _Join.apply(dim, lying, *parts)  # type: ignore[no-untyped-call] # torch types no apply
    return whole


def context_parts(tp: TensorParallel, x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
    """The positions of each context shard of this rank, in the regions or outside; x itself, if it has only one."""
    return (x,) if tp.contexts == 1 else split(x, tp.contexts, dim)


def join_contexts(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """The inverse of context_parts."""
    return parts[0] if len(parts) == 1 else join(parts, dim)


def heads_of_shards(tp: TensorParallel, *xs: Tensor) -> list[tuple[Tensor, ...]]:
    """Each x [B, h, S, K] cut into the heads of this rank's tensor shards, which lie in memory as x does: with its
    dimensions in the same order, of which kernels' sums may depend."""
    if tp.exact is None:
        return [xs]
    return list(zip(*(split(x, tp.shards, 1, torch.preserve_format) for x in xs)))


def heads_of_keys(tp: TensorParallel, both: Tensor) -> tuple[Tensor, ...]:
    """[2, B, g, S, K], keys and values, cut into the heads of this rank's tensor shards."""
    return (both,) if tp.shards == 1 else split(both, tp.shards, 2)


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


def spread(x: Tensor, num: int) -> tuple[Tensor, ...]:
    """x for each of this rank's shards, tensor shards inside a region or context shards in attention."""
    if num == 1:
        return (x,)
    made: tuple[Tensor, ...] = _Spread.apply(x, num)  # type: ignore[no-untyped-call] # torch types no apply
    return made


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.shard.grad.add_(grad)
        return None, None


def kept_shard(tp: TensorParallel, parameter: Tensor | None, context: int = 0) -> Shard | None:
    """The shard that receives the gradient of a parameter's present use, if other uses give it a gradient too; None if
    this is the only one."""
    if tp.exact is None or not isinstance(parameter, nn.Parameter):
        return None
    use = tp.exact.use_of(parameter)
    if use is None and tp.exact.contexts == 1:
        return None
    return Shard(tp.exact, parameter, use=use, context=context)


def recorded(tp: TensorParallel, parameter: nn.Parameter, part: int | None = None, context: int = 0) -> Tensor:
    """The parameter, whose gradient here is kept apart if it is one of several: of context shards, parts, or uses by
    pieces."""
    if tp.exact is None or not parameter.requires_grad:
        return parameter
    use = tp.exact.use_of(parameter)
    if part is None and use is None and tp.exact.contexts == 1:
        return parameter
    shard = Shard(tp.exact, parameter, part=part or 0, use=use, context=context)
    made: Tensor = _Recorded.apply(parameter, shard)  # type: ignore[no-untyped-call] # torch types no apply
    return made


@dataclass(frozen=True, eq=False)
class RegionShard:
    """A tensor shard of a context shard, of those that this rank computes one by one inside a region: all that it
    holds, unless the run is exact on fewer ranks."""

    tp: TensorParallel
    number: int = 0
    """Number of the tensor shard, among those of this rank."""
    context: int = 0
    """Number of the context shard, likewise."""
    sender: int = 0
    """Number of the rank of ep that has sent the tokens, where the experts of this rank compute those of others too."""

    def weight_of(self, layer: nn.Module) -> nn.Parameter | Shard:
        """The shard's slice of a layer's weight; the weight itself, if this rank has but one shard and its own tokens.
        What tensor shards share, as an adapter's one matrix, has a part of its gradient from each."""
        weight, exact = layer.get_parameter("weight"), self.tp.exact
        if exact is None or not (self.tp.computes_shards or weight in exact.of_cut_experts):
            return weight
        shard = Shard(exact, weight, context=self.context, sender=self.sender)
        dim = spec_of(layer, "weight").shard_dim
        if dim is None:
            return replace(shard, part=self.number)
        size = weight.shape[dim] // self.tp.shards
        return replace(shard, index=(slice(None),) * dim + (slice(self.number * size, (self.number + 1) * size),))

    def shared(self, parameter: nn.Parameter) -> Tensor:
        """A parameter that each shard multiplies by, and has a part of its gradient from each."""
        if not self.tp.computes_shards:
            return parameter
        return recorded(self.tp, parameter, self.number, self.context)


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return laid_out(grad)


def contiguous_gradient(x: Tensor) -> Tensor:
    """x, whose gradient is laid out in memory as a tensor of its own: products read it so in every layout."""
    made: Tensor = _ContiguousGradient.apply(x)  # type: ignore[no-untyped-call] # torch types no apply
    return made


def by_shards(tp: TensorParallel, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """f(*xs) for functions of each number of xs [B, S, f] alone."""
    if not tp.computes_shards:
        return f(*xs)

    def of_context(*xs: Tensor) -> Tensor:
        return join([f(*parts) for parts in zip(*(split(x, tp.shards) for x in xs))])

    return join_contexts([of_context(*parts) for parts in zip(*(context_parts(tp, x) for x in xs))])


def by_heads(tp: TensorParallel, f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: nn.Parameter) -> Tensor:
    """f(x, weight) for functions of each head of x [B, h, S, K] alone, with one weight for all heads."""
    if tp.exact is None:
        return f(x, weight)

    def of_context(context: int, x: Tensor) -> Tensor:
        heads = split(x, tp.shards, 1)  # of one shard too: a sum's order follows the strides
        return join([f(part, recorded(tp, weight, number, context)) for number, part in enumerate(heads)], 1)

    return join_contexts([of_context(context, part) for context, part in enumerate(context_parts(tp, x, 2))], 2)


def row_shard(
    tp: TensorParallel, parameter: nn.Parameter | None, parts: int | None, number: int, context: int
) -> Shard | None:
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
    rows = slice((which - first) * size, (which - first + 1) * size)
    return Shard(exact, parameter, (rows,), part // slices, context=context)


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
    alone = replace(tp, axis=SINGLE, sequence_parallel=False)

    def of_context(context: int, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        made: list[tuple[Tensor, ...]] = []
        for number, copies in enumerate(zip(*(spread(x, tp.shards) for x in xs))):
            mine, more = ([row_shard(tp, p, parts, number, context) for p, parts in of] for of in (owned, others))
            outputs = compute(alone, reads, mine, None, *copies, *(shard and shard.values() for shard in mine))
            made.append(finish(outputs, [present(shard).recorded() for shard in more]))
        return tuple(map(join, zip(*made)))

    wholes = zip(*(context_parts(tp, copy_to_tp_region(x, tp)) for x in xs))
    return tuple(map(join_contexts, zip(*(of_context(context, parts) for context, parts in enumerate(wholes)))))


def rows_of_shards(
    compute: Callable[..., tuple[Tensor, ...]], tp: TensorParallel, x: Tensor, weights: Sequence[nn.Parameter]
) -> tuple[Tensor, ...]:
    """A row-parallel layer's products (linear.py) with x [B, S, f] shard by shard, each summed over all of them."""
    alone, size = replace(tp, axis=SINGLE, sequence_parallel=False), x.shape[-1] // tp.shards

    def of_context(context: int, x: Tensor) -> tuple[Tensor, ...]:
        products: list[tuple[Tensor, ...]] = []
        for number, channels in enumerate(split(x, tp.shards)):
            columns = (slice(None), slice(number * size, (number + 1) * size))
            shards = [Shard(present(tp.exact), weight, columns, context=context) for weight in weights]
            values = [shard.values() for shard in shards]
            products.append(compute(alone, None, len(shards), shards, *values, channels))
        return tuple(map(tree_sum, zip(*products)))

    of_contexts = [of_context(context, part) for context, part in enumerate(context_parts(tp, x))]
    return tuple(reduce_from_tp_region(join_contexts(of_weight), tp) for of_weight in zip(*of_contexts))
