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
from roots_dist.parallel.tensor.collectives import (
    TensorParallel,
    start_copy_to,
    start_copy_to_backward,
    start_reduce_from,
    start_reduce_from_backward,
)
from roots_dist.world.sharding import ShardSpec, declare


def _weight_gradient(tp: TensorParallel, weight: nn.Parameter, grad_out: Tensor, x: Tensor) -> Tensor | None:
    """grad_outᵀ x, [out, in]. If weight gradients are deferred, return None and add it to .grad later.

    weight: the parameter itself, not the tensor that autograd saved, which is another one under recomputation.
    """
    grad_out, x = grad_out.flatten(0, -2), x.flatten(0, -2)
    if not tp.deferred.enabled:
        return grad_out.t() @ x
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)

    def add() -> None:
        present(weight.grad).addmm_(grad_out.t(), x)

    tp.deferred.defer(add)
    return None


class _ColumnParallel(torch.autograd.Function):
    """Several column-parallel layers on one input, which is gathered once and whose gradient is summed once."""

    @staticmethod
    def forward(
        ctx: Any, tp: TensorParallel, x: Tensor, num_weights: int, *weights_and_biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights = cast("tuple[Tensor, ...]", weights_and_biases[:num_weights])  # only a bias may be None
        biases = weights_and_biases[num_weights:]
        ctx.tp, ctx.parameters = tp, weights
        ctx.save_for_backward(x, *weights)
        whole = start_copy_to(x, tp)()  # [B, S, D]
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases))  # each [B, S, f]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_x, need_weights, need_biases = ctx.needs_input_grad[1], *_halves(ctx.needs_input_grad[3:])
        gathering = start_copy_to(x, ctx.tp) if any(need_weights) else None  # overlaps with the input's gradient
        grad_x = None
        if need_x:
            first, *rest = zip(grads, weights)
            grad_whole = first[0] @ first[1]
            for grad, weight in rest:
                grad_whole.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
            grad_x = start_copy_to_backward(grad_whole, ctx.tp)  # overlaps with the weights' gradients
        whole = gathering() if gathering else None
        grad_weights = [
            _weight_gradient(ctx.tp, w, g, whole) if n and whole is not None else None
            for w, g, n in zip(ctx.parameters, grads, need_weights)
        ]
        grad_biases = [g.flatten(0, -2).sum(0) if n else None for g, n in zip(grads, need_biases)]
        return None, grad_x() if grad_x else None, None, *grad_weights, *grad_biases


def _halves(values: Sequence[bool]) -> tuple[Sequence[bool], Sequence[bool]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


class _RowParallel(torch.autograd.Function):
    """activation(*inputs) Aᵀ for each A, summed over tensor ranks. The activation is recomputed, not saved."""

    @staticmethod
    def forward(
        ctx: Any, tp: TensorParallel, activation: Callable[..., Tensor] | None, num_weights: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, inputs = tensors[:num_weights], tensors[num_weights:]
        ctx.tp, ctx.parameters, ctx.activation = tp, weights, activation
        ctx.save_for_backward(*tensors)
        x = activation(*inputs) if activation else inputs[0]  # [B, S, f]
        leaving = [start_reduce_from(F.linear(x, w), tp) for w in weights]
        return tuple(y() for y in leaving)  # each [B, s, D]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        num, saved = len(grads), ctx.saved_tensors  # read once: recomputation unpacks saved tensors only once
        weights, inputs = saved[:num], saved[num:]
        need_weights, need_inputs = ctx.needs_input_grad[3 : 3 + num], any(ctx.needs_input_grad[3 + num :])
        gathering = [start_reduce_from_backward(g, ctx.tp) for g in grads]
        grads = tuple(g() for g in gathering)  # each [B, S, D]
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
            _weight_gradient(ctx.tp, w, g, x.detach()) if n else None
            for w, g, n in zip(ctx.parameters, grads, need_weights)
        ]
        if need_inputs and ctx.activation:
            grad_inputs = torch.autograd.grad(x, inputs, grad_inputs)
        return None, None, None, *grad_weights, *grad_inputs


class ColumnParallelLinear(nn.Module):
    """F features, sharded over tensor ranks: this rank computes f of them from the whole input."""

    def __init__(
        self, tp: TensorParallel, width: int, features: int, *, bias: bool, std: float, parts: int | None = None
    ):
        super().__init__()
        self.tp = tp
        shared = parts is not None and parts < tp.size  # several ranks use the same slice for different heads
        spec = ShardSpec(shape=(features, width), shard_dim=0, shards=parts, std=std, partial=shared)
        self.weight = declare(self, "weight", spec, tp.axis)
        bias_spec = ShardSpec(shape=(features,), shard_dim=0, shards=parts, partial=shared)
        self.bias = declare(self, "bias", bias_spec, tp.axis) if bias else None
        self.spec = spec
        self.lora: Adapter | None = None

    def adapt(self, rank: int, scale: float) -> None:
        """Add a LoRA adapter. Every rank computes the whole x aᵀ [B, S, R] for its own features, so its gradient of `a`
        is partial."""
        features, width = self.spec.shape
        a = ShardSpec(shape=(rank, width), std=width**-0.5, partial=True)
        b = replace(self.spec, shape=(features, rank), std=None)
        self.lora = Adapter(a, b, scale, self.tp.axis)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(self.tp, x, [self])[0]


def column_parallel(tp: TensorParallel, x: Tensor, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
    """Outputs [B, S, f] of several layers on the same x [B, s, D]."""
    adapters = [l.lora for l in layers if l.lora is not None]
    weights = [*(l.weight for l in layers), *(adapter.a.weight for adapter in adapters)]
    biases = [*(l.bias for l in layers), *(None for _ in adapters)]
    outputs = _ColumnParallel.apply(  # type: ignore[no-untyped-call] # torch types no apply
        tp, x, len(weights), *weights, *biases
    )
    low = iter(outputs[len(layers) :])
    return tuple(y if l.lora is None else l.lora(y, next(low)) for l, y in zip(layers, outputs))


class RowParallelLinear(nn.Module):
    """D features from an input of which this rank holds f channels: a sum over ranks, then the bias once."""

    def __init__(self, tp: TensorParallel, channels: int, width: int, *, bias: bool, std: float):
        super().__init__()
        self.tp = tp
        self.spec = ShardSpec(shape=(width, channels), shard_dim=1, std=std)
        self.lora: Adapter | None = None
        self.weight = declare(self, "weight", self.spec, tp.axis)
        bias_spec = ShardSpec(shape=(width,), partial=tp.sequence_parallel)
        self.bias = declare(self, "bias", bias_spec, tp.axis) if bias else None

    def adapt(self, rank: int, scale: float) -> None:
        """Add a LoRA adapter. x aᵀ is summed over ranks like the layer's own output, on this rank's positions; `b` is
        replicated."""
        width, channels = self.spec.shape
        a = ShardSpec(shape=(rank, channels), shard_dim=1, std=channels**-0.5)
        b = ShardSpec(shape=(width, rank), partial=self.tp.sequence_parallel)
        self.lora = Adapter(a, b, scale, self.tp.axis)

    def forward(self, *inputs: Tensor, activation: Callable[..., Tensor] | None = None) -> Tensor:
        """[B, S, f] -> [B, s, D]. `activation` maps several inputs to the layer's input and is recomputed."""
        weights = [self.weight] if self.lora is None else [self.weight, self.lora.a.weight]
        made: tuple[Tensor, ...] = _RowParallel.apply(  # type: ignore[no-untyped-call] # torch types no apply
            self.tp, activation, len(weights), *weights, *inputs
        )
        y = made[0] if self.lora is None else self.lora(*made)
        return y if self.bias is None else y + self.bias
