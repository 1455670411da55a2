"""What the MLP does to each number between its matrices, and a pooler after its layer.

Gated ones (config/activations.py GATED) multiply by it.
"""

from __future__ import annotations

from collections.abc import Callable

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
    "tanh": torch.tanh,
}


def activation(config: Config, name: str | None = None) -> Activation:
    """Give the function of one matrix's output, or (gate, up) of two; `name` is another than the config's."""
    name = name or config.model.activation
    if name in config.extension.activations:
        return config.extension.activations[name]
    if name not in GATED:
        return FUNCTIONS[name]
    function = FUNCTIONS[GATED[name]]

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return function(gate) * up

    return gated
