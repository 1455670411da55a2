"""What the MLP does to each number between its matrices, and a pooler after its layer.

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


def activation(config: Config, name: str | None = None) -> Activation:
    """Give the function of one matrix's output, or (gate, up) of two; `name` is another than the config's."""
    name = name or config.model.activation
    if name in config.extension.activations:
        return config.extension.activations[name]
    if name not in GATED:
        return FUNCTIONS[name]
    function = FUNCTIONS[GATED[name]]

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        if function is not F.silu:
            return function(gate) * up
        out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call] # torch types no apply
        return out

    return gated


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, of which only the two inputs are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
