"""What the MLP does to each number between its matrices. Gated ones (config/model.py GATED) multiply by it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from roots_dist.config.model import GATED

Activation = Callable[..., Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Activation:
    """Give the function of one matrix's output, or (gate, up) of two."""
    if name not in GATED:
        return FUNCTIONS[name]
    function = FUNCTIONS[GATED[name]]

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return function(gate) * up

    return gated
