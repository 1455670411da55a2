"""Linear layers that are sharded over tensor-parallel ranks: by columns on the way into a region, by rows on the way
out.

    ColumnParallelLinear  Y = X A + b         RowParallelLinear  Z = Y B + c
                          A = [A_1 | A_2]                        B = [B_1 ; B_2]  (B_1 above B_2)
    rank i computes       Y_i = X A_i + b_i                      Y_i B_i; Z is the sum over ranks, plus c
    X is                  whole on every rank                    Y_i: this rank's features, output of the first layer
    (weights are stored as in torch, [out, in], so A_i are rows of the weight and B_i columns)

Backward sends the input's gradient while it computes the weights' gradients, saves only this rank's positions under
sequence parallelism, can defer the weights' gradients for a zero-bubble schedule (TensorParallel.deferred), and
computes no gradient that is not needed (frozen weights, and everything below the lowest trainable layer). B sequences,
S positions, D width in, F features out, R rank of an adapter; f = F/tp, s = S/tp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.parallel.tensor.adapter import Adapter
from roots_dist.parallel.tensor.by_positions import ADD, by_positions
from roots_dist.parallel.tensor.collectives import (
    TensorParallel,
    reduce_from_tp_region,
    start_copy_to,
    start_copy_to_backward,
    start_reduce_from,
    start_reduce_from_backward,
)
from roots_dist.parallel.tensor.exact import Owned, Shard, columns_of_shards, laid_out, rows_of_shards
from roots_dist.parallel.tensor.weight_gradient import weight_gradient
from roots_dist.world.mesh import SINGLE
from roots_dist.world.sharding import ShardSpec, declare


class _ColumnParallel(torch.autograd.Function):
    """Several column-parallel layers on one input, or on a few: these are gathered in one message, and their gradients
    summed in one. reads: for each weight, the number of the input that it reads. shards: what the weights and biases
    are shards of, if they are not the parameters themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        tp: TensorParallel,
        reads: Sequence[int],
        shards: Sequence[Shard | None],
        before_first: Callable[..., None] | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        num_inputs = max(reads) + 1
        xs = cast("tuple[Tensor, ...]", tensors[:num_inputs])
        weights = cast("tuple[Tensor, ...]", tensors[num_inputs : num_inputs + len(reads)])  # only a bias may be None
        biases = tensors[num_inputs + len(reads) :]
        ctx.tp, ctx.parameters, ctx.reads, ctx.num_inputs = tp, shards or (*weights, *biases), reads, num_inputs
        ctx.bias_dtypes = [b.grad_dtype if b is not None and b.is_leaf else None for b in biases]
        ctx.save_for_backward(*xs, *weights)
        wholes = _start_copies(xs, tp)()  # each [B, S, D]
        first, *rest = zip(reads, weights, biases)
        others = [F.linear(wholes[i], w, b) for i, w, b in rest]  # each [B, S, f]
        if before_first is not None:
            before_first(*others)
        return F.linear(wholes[first[0]], *first[1:]), *others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        num, reads, tp = ctx.num_inputs, ctx.reads, ctx.tp
        grads = grads if tp.exact is None else tuple(map(laid_out, grads))  # a sum's order follows the strides
        saved = ctx.saved_tensors
        xs, weights = saved[:num], saved[num:]
        need_x, need_weights, need_biases = (
            any(ctx.needs_input_grad[4 : 4 + num]),
            *_halves(ctx.needs_input_grad[4 + num :]),
        )
        gathering = _start_copies(xs, tp) if any(need_weights) else None  # overlaps with the inputs' gradients
        grad_xs = None
        if need_x:
            grad_wholes = [_input_gradient(reads, i, grads, weights) for i in range(num)]
            grad_xs = _start_sums(grad_wholes, tp)  # overlaps with the weights' gradients
        wholes = gathering() if gathering else None
        grad_weights = [
            weight_gradient(tp, w, g, wholes[i]) if n and wholes is not None else None
            for i, w, g, n in zip(reads, ctx.parameters, grads, need_weights)
        ]
        grad_biases = [
            _bias_gradient(b, g, dtype) if n else None
            for b, g, n, dtype in zip(ctx.parameters[len(reads) :], grads, need_biases, ctx.bias_dtypes)
        ]
        return None, None, None, None, *(grad_xs() if grad_xs else (None,) * num), *grad_weights, *grad_biases


def _bias_gradient(bias: nn.Parameter | Shard, grad_out: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    if isinstance(bias, Shard):
        bias.grad.add_(grad_out.flatten(0, -2).sum(0, dtype=bias.parameter.grad_dtype))
        return None
    return grad_out.flatten(0, -2).sum(0, dtype=dtype)


def _input_gradient(reads: Sequence[int], i: int, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Gradient of input i [B, S, D] from this rank's columns."""
    first, *rest = ((grad, weight) for read, grad, weight in zip(reads, grads, weights) if read == i)
    grad_whole = first[0] @ first[1]
    for grad, weight in rest:
        grad_whole.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
    return grad_whole


def _start_copies(xs: Sequence[Tensor], tp: TensorParallel) -> Callable[[], Sequence[Tensor]]:
    """Start to build each input [B, S, D] of a region; if they must be gathered, in one message."""
    if len(xs) == 1 or tp.size == 1 or not tp.sequence_parallel:
        pending = [start_copy_to(x, tp) for x in xs]
        return lambda: [p() for p in pending]
    together = start_copy_to(torch.cat(tuple(xs)), tp)
    return lambda: together().chunk(len(xs))


def _start_sums(grads: Sequence[Tensor], tp: TensorParallel) -> Callable[[], Sequence[Tensor]]:
    """Start to sum the gradients of a region's inputs over ranks, in one message. Overwrites them."""
    if len(grads) == 1 or tp.size == 1:
        pending = [start_copy_to_backward(g, tp) for g in grads]
        return lambda: [p() for p in pending]
    together = start_copy_to_backward(torch.cat(tuple(grads)), tp)
    return lambda: together().chunk(len(grads))


def _halves(values: Sequence[bool]) -> tuple[Sequence[bool], Sequence[bool]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


class _RowParallel(torch.autograd.Function):
    """activation(*inputs) Aᵀ for each A, summed over tensor ranks. The activation is recomputed, not saved."""

    @staticmethod
    def forward(
        ctx: Any,
        tp: TensorParallel,
        activation: Callable[..., Tensor] | None,
        num_weights: int,
        shards: Sequence[Shard],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, inputs = tensors[:num_weights], tensors[num_weights:]
        ctx.tp, ctx.parameters, ctx.activation = tp, shards or weights, activation
        ctx.save_for_backward(*tensors)
        x = activation(*inputs) if activation else inputs[0]  # [B, S, f]
        leaving = [start_reduce_from(F.linear(x, w), tp) for w in weights]
        return tuple(y() for y in leaving)  # each [B, s, D]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        num, saved = len(grads), ctx.saved_tensors  # read once: recomputation unpacks saved tensors only once
        weights, inputs = saved[:num], saved[num:]
        need_weights, need_inputs = ctx.needs_input_grad[4 : 4 + num], any(ctx.needs_input_grad[4 + num :])
        gathering = [start_reduce_from_backward(g, ctx.tp) for g in grads]
        grads = tuple(g() for g in gathering)  # each [B, S, D]
        grads = grads if ctx.tp.exact is None else tuple(map(laid_out, grads))
        if ctx.activation:
            inputs = [i.detach().requires_grad_(need_inputs) for i in inputs]
            with torch.enable_grad():
                x = ctx.activation(*inputs)
        else:
            x = inputs[0]
        grad_inputs: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if need_inputs:
            grad_x = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:]):
                grad_x.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
            grad_inputs = (grad_x,)
        grad_weights = [
            weight_gradient(ctx.tp, w, g, x.detach()) if n else None
            for w, g, n in zip(ctx.parameters, grads, need_weights)
        ]
        if need_inputs and ctx.activation:
            grad_inputs = torch.autograd.grad(x, inputs, grad_inputs)
        return None, None, None, None, *grad_weights, *grad_inputs


class ColumnParallelLinear(nn.Module):
    """F features, sharded over tensor ranks: this rank computes f of them from the whole input."""

    def __init__(
        self,
        tp: TensorParallel,
        width: int,
        features: int,
        *,
        bias: bool,
        std: float,
        parts: int | None = None,
        of_expert: bool = False,
    ):
        """parts: the most slices that the features can be cut into; None: as many as there are."""
        super().__init__()
        self.tp = tp
        shared = parts is not None and parts < tp.size  # several ranks use the same slice for different heads
        slices = None if parts is None else min(parts, tp.size)
        spec = ShardSpec(
            shape=(features, width), shard_dim=0, shards=slices, std=std, partial=shared, of_expert=of_expert
        )
        self.weight = declare(self, "weight", spec, tp.axis)
        bias_spec = ShardSpec(shape=(features,), shard_dim=0, shards=slices, partial=shared)
        self.bias = declare(self, "bias", bias_spec, tp.axis) if bias else None
        self.spec, self.parts = spec, parts
        self.lora: Adapter | None = None

    def adapt(self, rank: int, scale: float) -> None:
        """Add a LoRA adapter. Every rank computes the whole x aᵀ [B, S, R] for its own features, so its gradient of `a`
        is partial."""
        features, width = self.spec.shape
        a = ShardSpec(shape=(rank, width), std=width**-0.5, partial=True, of_expert=self.spec.of_expert)
        b = replace(self.spec, shape=(features, rank), std=None)
        self.lora = Adapter(a, b, scale, self.tp)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(self.tp, x, [self])[0]


def column_parallel(tp: TensorParallel, x: Tensor, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
    """Outputs [B, S, f] of several layers on the same x [B, s, D]."""
    return column_parallel_on(tp, (x,), [(0, layer) for layer in layers])


def column_parallel_on(
    tp: TensorParallel,
    xs: Sequence[Tensor],
    reading: Sequence[tuple[int, ColumnParallelLinear]],
    before_first: Callable[..., None] | None = None,
) -> tuple[Tensor, ...]:
    """Outputs [B, S, f] of several layers, each with the number of the x [B, s, D] that it reads; each x is read.
    before_first is called with all outputs but the first, without adapters, before that is computed: to send them."""
    layers, adapting = [layer for _, layer in reading], [(i, layer) for i, layer in reading if layer.lora is not None]
    adapters = [present(layer.lora) for _, layer in adapting]
    reads = [i for i, _ in (*reading, *adapting)]

    def adapted(outputs: Sequence[Tensor], bs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        low = zip(outputs[len(layers) :], bs)
        return tuple(y if l.lora is None else l.lora(y, *next(low)) for l, y in zip(layers, outputs))

    if tp.computes_shards:
        owned: list[Owned] = [*((l.weight, l.parts) for l in layers), *((adapter.a.weight, 1) for adapter in adapters)]
        owned += [*((l.bias, l.parts) for l in layers), *((None, 1) for _ in adapters)]
        bs = [(adapter.b.weight, layer.parts) for adapter, (_, layer) in zip(adapters, adapting)]
        return columns_of_shards(_ColumnParallel.apply, tp, xs, reads, owned, bs, adapted)
    # outputs that adapters read are behind those of the layers
    before = before_first and (lambda *others: before_first(*others[: len(layers) - 1]))
    weights = [*(l.weight for l in layers), *(adapter.a.weight for adapter in adapters)]
    biases = [*(l.bias for l in layers), *(None for _ in adapters)]
    outputs = _ColumnParallel.apply(  # type: ignore[no-untyped-call] # torch types no apply
        tp, reads, (), before, *xs, *weights, *biases
    )
    return adapted(outputs, [None for _ in adapters])


class RowParallelLinear(nn.Module):
    """D features from an input of which this rank holds f channels: a sum over ranks, then the bias once."""

    def __init__(
        self,
        tp: TensorParallel,
        channels: int,
        width: int,
        *,
        bias: bool,
        std: float,
        in_sum: bool = False,
        of_expert: bool = False,
    ):
        """in_sum: the layer is one of those that row_parallel_sum adds up before anything is sent."""
        super().__init__()
        self.tp, self.in_sum = tp, in_sum
        self.spec = ShardSpec(shape=(width, channels), shard_dim=1, std=std, of_expert=of_expert)
        self.lora: Adapter | None = None
        self.weight = declare(self, "weight", self.spec, tp.axis)
        bias_spec = ShardSpec(shape=(width,), partial=tp.has_partial_gradients)
        self.bias = declare(self, "bias", bias_spec, tp.axis) if bias else None

    def adapt(self, rank: int, scale: float) -> None:
        """Add a LoRA adapter. x aᵀ is summed over ranks like the layer's own output, on this rank's positions; `b` is
        replicated. In a sum of layers, `b` multiplies this rank's part of x aᵀ, and has a part of its gradient."""
        width, channels = self.spec.shape
        of_expert = self.spec.of_expert
        a = ShardSpec(shape=(rank, channels), shard_dim=1, std=channels**-0.5, of_expert=of_expert)
        b = ShardSpec(shape=(width, rank), partial=self.tp.has_partial_gradients or self.in_sum, of_expert=of_expert)
        self.lora = Adapter(a, b, scale, self.tp)

    def forward(self, *inputs: Tensor, activation: Callable[..., Tensor] | None = None) -> Tensor:
        """[B, S, f] -> [B, s, D]. `activation` maps several inputs to the layer's input and is recomputed."""
        y = self.product(self.tp, inputs, activation)
        return y if self.bias is None else by_positions(self.tp, ADD, y, self.bias)

    def product(self, tp: TensorParallel, inputs: Sequence[Tensor], activation: Callable[..., Tensor] | None) -> Tensor:
        """The same without the bias, summed over the ranks of `tp`."""
        weights = [self.weight] if self.lora is None else [self.weight, self.lora.a.weight]
        if tp.computes_shards:
            x = activation(*inputs) if activation else inputs[0]
            made = rows_of_shards(_RowParallel.apply, tp, x, weights)
        else:
            made = _RowParallel.apply(  # type: ignore[no-untyped-call] # torch types no apply
                tp, activation, len(weights), (), *weights, *inputs
            )
        return made[0] if self.lora is None else by_positions(tp, self.lora, *made, self.lora.b.weight)


Summand = tuple[RowParallelLinear, Sequence[Tensor], Callable[..., Tensor] | None]
"""A layer, its inputs and its activation, as for RowParallelLinear.forward."""


def row_parallel_sum(tp: TensorParallel, summands: Sequence[Summand]) -> Tensor:
    """[B, s, D]: the sum of several layers (made with in_sum), in one message: parallel branches."""
    alone = replace(tp, axis=SINGLE, sequence_parallel=False)  # the same deferred gradients, and nothing is sent
    first, *rest = (layer.product(alone, inputs, activation) for layer, inputs, activation in summands)
    y = reduce_from_tp_region(sum(rest, start=first), tp)
    for layer, _, _ in summands:
        y = y if layer.bias is None else y + layer.bias
    return y
