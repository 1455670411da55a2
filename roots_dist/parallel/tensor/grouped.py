"""Products of an input with several matrices, of which each reads rows of its own: the linear layers of experts.

    x [M, D], its rows sorted by expert; W [F, D] of each of n experts --grouped_linear--> y [M, F]: x Wᵀ, of its rows

One kernel does it for all experts where there is one (torch's grouped product: bfloat16 and float32), whatever their
number; one product after the other where there is none (float64, widths that the kernel does not take). The matrices
are separate parameters, each with its own name and gradient. `pack` makes them neighbours in memory, and so are their
gradients: a kernel that wants them as one tensor [n, F, D] gets it without a copy. An engine may move them apart; then
they are copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.parallel.tensor.deferred import DeferredWeightGrads
from roots_dist.parallel.tensor.exact import RegionShard, Shard, aligned, begins_aligned
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from roots_dist.world.sharding import set_grad

Layers = Sequence[ColumnParallelLinear | RowParallelLinear]
"""The same layer of each expert."""
Weights = Sequence[nn.Parameter]
Held = Sequence[nn.Parameter | Shard]
"""Matrices of one shape: parameters, or in an exact run shards of them."""
ALIGNMENT = 16
"""Bytes that a row's width must be a multiple of for the grouped kernel."""
VECTOR = 64
"""Numbers of which a kernel computes a multiple without a tail."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The rows of an input that belong to each expert."""

    ends: Tensor
    """int32 [n]: number of the row after each expert's last one."""
    rows: int
    """All of them: M."""
    known: Sequence[int] | None = None
    """The sizes, if the host knows them already."""

    @classmethod
    def of_all(cls, x: Tensor) -> Groups:
        """One group of all rows."""
        return cls(torch.full((1,), len(x), dtype=torch.int32, device=x.device), len(x), [len(x)])

    @cached_property
    def sizes(self) -> Sequence[int]:
        """Rows of each expert. The host may wait for them. Where there are only shapes (roots plan), as even as they
        may be."""
        if self.known is not None:
            return self.known
        if self.ends.is_meta:
            return even(self.rows, len(self.ends))
        ends: list[int] = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends)]


def even(rows: int, parts: int) -> list[int]:
    """Sizes of parts that are as even as they may be."""
    each, rest = divmod(rows, parts)
    return [each + (number < rest) for number in range(parts)]


def pack(weights: Weights) -> None:
    """Make parameters of one shape neighbours in memory. Their values are lost."""
    whole = weights[0].data.new_empty(len(weights), *weights[0].shape)
    for weight, place in zip(weights, whole):
        weight.data = place


def grouped_linear(
    shard: RegionShard,
    groups: Groups,
    layers: Sequence[Layers],
    *inputs: Tensor,
    activation: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Output [M, F] of each of `layers` on one input [M, D], with adapters and without biases, of a shard's columns or
    rows of every expert: nothing is sent. `activation` maps several inputs to the layers' input and is computed again
    in backward."""
    adapters = [[present(layer.lora) for layer in of] if of[0].lora is not None else None for of in layers]
    stacks = [[shard.weight_of(layer) for layer in of] for of in layers]
    stacks += [[shard.weight_of(adapter.a) for adapter in of] for of in adapters if of is not None]

    made = _apply(shard, groups, activation, stacks, *inputs)
    low = iter(made[len(layers) :])
    outputs = []
    for y, of in zip(made, adapters):
        if of is not None:
            (more,) = _apply(shard, groups, None, [[shard.weight_of(adapter.b) for adapter in of]], next(low))
            add = partial(torch.add, alpha=of[0].scale)
            y = add(y, more) if shard.tp.exact is None else of_whole_vectors(add, y, more)
        outputs.append(y)
    return tuple(outputs)


def of_whole_vectors(f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """f(*xs) for functions of each number of xs [M, f] alone, where the layout decides how many rows there are: none of
    them is in a kernel's tail."""
    rows, more = len(xs[0]), -len(xs[0]) % VECTOR
    return f(*(F.pad(x, (0, 0, 0, more)) for x in xs))[:rows] if more else f(*xs)


def _apply(
    shard: RegionShard,
    groups: Groups,
    activation: Callable[..., Tensor] | None,
    stacks: Sequence[Held],
    *inputs: Tensor,
) -> tuple[Tensor, ...]:
    parameters = map(_parameter, itertools.chain(*stacks))
    made: tuple[Tensor, ...] = _Grouped.apply(  # type: ignore[no-untyped-call] # torch types no apply
        shard.tp.deferred, groups, activation, stacks, *inputs, *parameters
    )
    return made


def _parameter(weight: nn.Parameter | Shard) -> nn.Parameter:
    return weight.parameter if isinstance(weight, Shard) else weight


class _Grouped(torch.autograd.Function):
    """Parameters come as arguments only for autograd to know them: their gradients are added to .grad here, for all
    experts at once."""

    @staticmethod
    def forward(
        ctx: Any,
        deferred: DeferredWeightGrads,
        groups: Groups,
        activation: Callable[..., Tensor] | None,
        stacks: Sequence[Held],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = tensors[: len(tensors) - sum(map(len, stacks))]
        ctx.deferred, ctx.groups, ctx.activation, ctx.stacks = deferred, groups, activation, stacks
        ctx.save_for_backward(*inputs)
        x = activation(*inputs) if activation else inputs[0]
        return tuple(_product(x, _as_one(weights).transpose(1, 2), groups) for weights in stacks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs: Sequence[Tensor] = ctx.saved_tensors
        need_inputs = any(ctx.needs_input_grad[4 : 4 + len(inputs)])
        need_weights = iter(ctx.needs_input_grad[4 + len(inputs) :])
        if ctx.activation:
            inputs = [i.detach().requires_grad_(need_inputs) for i in inputs]
            with torch.enable_grad():
                x = ctx.activation(*inputs)
        else:
            x = inputs[0]
        grad_inputs: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if need_inputs:
            first, *rest = (_product(grad, _as_one(weights), ctx.groups) for grad, weights in zip(grads, ctx.stacks))
            grad_x = sum(rest, start=first)
            grad_inputs = torch.autograd.grad(x, inputs, grad_x) if ctx.activation else (grad_x,)
        for grad, weights in zip(grads, ctx.stacks):
            learning = [_parameter(weight) for weight in weights if next(need_weights)]
            if learning:
                _later(ctx.deferred, weights, learning, grad, x.detach(), ctx.groups)
        return None, None, None, None, *grad_inputs, *(None for weights in ctx.stacks for _ in weights)


def _later(
    deferred: DeferredWeightGrads, weights: Held, learning: Weights, grad: Tensor, x: Tensor, groups: Groups
) -> None:
    """Add the gradients of weights now, or when the schedule says so."""

    parameters = [weight for weight in weights if isinstance(weight, nn.Parameter)]
    shards = [weight for weight in weights if isinstance(weight, Shard)]

    def add() -> None:
        made = _gradients(grad, x, groups)
        if parameters:
            _add_gradients(parameters, learning, made)
        for shard, gradient in zip(shards, made):
            if shard.parameter.requires_grad:
                shard.grad.add_(gradient)

    if deferred.enabled:
        deferred.defer(add)
    else:
        add()


def _add_gradients(weights: Weights, learning: Weights, made: Tensor) -> None:
    """Add gradients [n, F, D] to .grad of the weights that learn. What has no .grad yet gets a view of them."""
    if all(weight.grad is None for weight in learning):
        made = made.to(present(weights[0].grad_dtype))
        for weight, gradient in zip(weights, made.unbind()):
            if weight.requires_grad:
                set_grad(weight, gradient)
        return
    together = _neighbours([weight.grad for weight in weights])
    if together is not None:
        together.add_(made)
        return
    for weight, gradient in zip(weights, made.unbind()):
        if weight.requires_grad and weight.grad is not None:
            weight.grad.add_(gradient)
        elif weight.requires_grad:
            set_grad(weight, gradient.to(weight.grad_dtype))


def _as_one(weights: Held) -> Tensor:
    """[n, F, D]: a view of weights that are neighbours, else a copy. Called where no graph is made."""
    tensors = [weight.view if isinstance(weight, Shard) else weight for weight in weights]
    together = _neighbours(tensors)
    if together is None:
        return torch.stack(tensors)
    return aligned(together) if isinstance(weights[0], Shard) else together


def _neighbours(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors of one shape as one, if they follow each other in memory."""
    first = tensors[0]
    if first is None or not first.is_contiguous():
        return None
    storage, start, size = first.untyped_storage()._cdata, first.storage_offset(), first.numel()
    for number, tensor in enumerate(tensors):
        if tensor is None or (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride()) != (
            storage,
            start + number * size,
            first.stride(),
        ):
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()), start)


def _product(x: Tensor, stack: Tensor, groups: Groups) -> Tensor:
    """[M, K] × [n, K, N] -> [M, N]"""
    if x.is_meta:
        return torch.bmm(_even_parts(x, len(stack)), stack).flatten(0, 1)[: len(x)]
    if _has_kernel(x, stack):
        return F.grouped_mm(x.contiguous(), stack, offs=groups.ends)
    out = x.new_empty(len(x), stack.shape[2])
    for rows, matrix, place in zip(x.split(groups.sizes), stack, out.split(groups.sizes)):
        _multiply(rows, matrix, place)
    return out


def _gradients(grad: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """[M, F], [M, D] -> [n, F, D]: gradᵀ x of each expert's rows; zeros where it has none."""
    if x.is_meta:
        return torch.bmm(_even_parts(grad, len(groups.ends)).transpose(1, 2), _even_parts(x, len(groups.ends)))
    if _has_kernel(x, grad):
        made = F.grouped_mm(grad.contiguous().t(), x.contiguous(), offs=groups.ends)
        starts = F.pad(groups.ends[:-1], (1, 0))  # some GPUs leave what they find where there are no rows
        return made.masked_fill_((groups.ends == starts).view(-1, 1, 1), 0)
    made = x.new_empty(len(groups.ends), grad.shape[1], x.shape[1])
    for rows_of_grad, rows, place in zip(grad.split(groups.sizes), x.split(groups.sizes), made):
        _multiply(rows_of_grad.t(), rows, place)
    return made


def _multiply(a: Tensor, b: Tensor, place: Tensor) -> None:
    """place = a b, in bits that do not depend on where these begin inside of larger tensors: a library may choose
    another kernel for what is not aligned."""
    own = place if begins_aligned(place) else torch.empty_like(place)
    torch.mm(*(factor if begins_aligned(factor) else factor.clone() for factor in (a, b)), out=own)
    if own is not place:
        place.copy_(own)


def _has_kernel(x: Tensor, other: Tensor) -> bool:
    if x.dtype not in (torch.bfloat16, torch.float32):
        return False
    widths = (x.shape[1], *other.shape[1:])
    return all(width * x.element_size() % ALIGNMENT == 0 for width in widths) and other.data_ptr() % ALIGNMENT == 0


def _even_parts(x: Tensor, parts: int) -> Tensor:
    """[M, K] -> [n, M/n, K], rounded up: what groups of tensors without values are taken for."""
    return x.new_empty(parts, -(-len(x) // parts), x.shape[1]) if len(x) % parts else x.unflatten(0, (parts, -1))
