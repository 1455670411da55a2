"""One Transformer block: attention, then MLP, each on the residual stream, with its norm before or after.

B sequences, D model width, F MLP width; f = F/tp, s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.models.attention import Attention, Cache
from roots_dist.models.norms import Dropout, Norm
from roots_dist.models.positions import Alibi, Rotary
from roots_dist.objectives.base import MicroBatch
from roots_dist.tensor.collectives import Split
from roots_dist.tensor.linear import ColumnLinear, RowLinear, columns


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "swiglu": _swiglu,  # Shazeer 2020
}


class MLP(nn.Module):
    def __init__(self, config: Config, split: Split, std_out: float):
        super().__init__()
        m = config.model
        self.split, self.activation = split, ACTIVATIONS[m.activation]
        self.recompute = config.train.recompute == "selective"

        def widen() -> ColumnLinear:
            return ColumnLinear(split, m.hidden, m.width_of_ffn(), bias=m.bias, std=m.std())

        self.up = widen()
        self.gate = widen() if m.gated() else None
        self.down = RowLinear(split, m.width_of_ffn(), m.hidden, bias=m.bias, std=std_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        wide = columns(self.split, x, [self.gate, self.up] if self.gate else [self.up])  # each [B, S, f]
        if self.recompute:
            return self.down(*wide, before=self.activation)
        return self.down(self.activation(*wide))


class Block(nn.Module):
    def __init__(self, config: Config, split: Split, name: str, positions: Rotary | Alibi | None):
        super().__init__()
        m = config.model
        std_out = m.std() / math.sqrt(2 * m.layers)  # 2 residual branches per layer of the whole model (GPT-2)
        self.pre = m.norm_position == "pre"
        self.norm1 = Norm(config, split)
        self.attention = Attention(config, split, name, positions, std_out)
        self.norm2 = Norm(config, split)
        self.mlp = MLP(config, split, std_out)
        self.dropout1 = Dropout(config, split, f"{name}.1")
        self.dropout2 = Dropout(config, split, f"{name}.2")

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch, cache: Cache | None = None) -> dict[str, Tensor]:
        x = payload["hidden"]  # [B, s, D]
        if self.pre:
            x = x + self.dropout1(self.attention(self.norm1(x), batch, cache), batch)
            x = x + self.dropout2(self.mlp(self.norm2(x)), batch)
        else:
            x = self.norm1(x + self.dropout1(self.attention(x, batch, cache), batch))
            x = self.norm2(x + self.dropout2(self.mlp(x), batch))
        return {"hidden": x}
