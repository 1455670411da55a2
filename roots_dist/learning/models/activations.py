"""Activation functions of the MLP, between its matrices, and of a pooler, after its layer.

Gated ones (config/activations.py GATED) multiply by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from roots_dist.config.activations import GATED
from roots_dist.config.schema import Config
from roots_dist.world.fuse import Fuse, eager

Activation = Callable[..., Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}
"""The functions of the MLP."""

POOLER_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu}
"""Values of model.pooler_activation."""


def activation(config: Config, name: str | None = None, fuse: Fuse = eager) -> Activation:
    """Give the function of one matrix's output, or (gate, up) of two; `name` is another than the config's."""
    name = name or config.model.activation
    if name in config.extension.activations:
        return config.extension.activations[name]
    if name not in GATED:
        return FUNCTIONS[name]
    kernels = [fuse(kernel) for kernel in KERNELS[GATED[name]]]

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = _Gated.apply(gate, up, *kernels)  # type: ignore[no-untyped-call] # torch types no apply
        return out

    return gated


class _Gated(torch.autograd.Function):
    """f(gate) · up, of which only the two inputs are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, forward: Activation, backward: Callable[..., Any]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernel = backward
        return forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernel(grad, *ctx.saved_tensors), None, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gelu_tanh(gate).mul_(up)


def _geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    slope = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return slope, _gelu_tanh(gate).mul_(grad)


KERNELS: dict[str, tuple[Callable[..., Any], ...]] = {
    "silu": (_swiglu, _swiglu_backward),
    "gelu_tanh": (_geglu, _geglu_backward),
}
"""The function of a gate (config/activations.py GATED) -> the gated activation and its backward."""
