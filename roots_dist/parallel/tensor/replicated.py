"""A linear layer that every tensor rank holds whole, outside of the tensor-parallel regions: what leads to something
narrow, which is sent in the place of its input.

Under sequence parallelism a rank multiplies its own positions, and its gradient is a part of a sum. Otherwise all ranks
compute the same, and have the same gradient. B sequences, D width in, F features out, R rank of an adapter; s positions
of this rank.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.parallel.tensor.adapter import Adapter
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.sharding import ShardSpec, declare


class ReplicatedLinear(nn.Module):
    """F features, without biases."""

    def __init__(self, tp: TensorParallel, width: int, features: int, std: float):
        super().__init__()
        self.tp, self.width, self.features = tp, width, features
        self.weight = declare(self, "weight", self._spec(features, width, std), tp.axis)
        self.lora: Adapter | None = None

    def _spec(self, features: int, width: int, std: float | None = None) -> ShardSpec:
        return ShardSpec(shape=(features, width), std=std, partial=self.tp.sequence_parallel)

    def adapt(self, rank: int, scale: float) -> None:
        """Add a LoRA adapter, replicated like the layer."""
        a, b = self._spec(rank, self.width, self.width**-0.5), self._spec(self.features, rank)
        self.lora = Adapter(a, b, scale, self.tp)

    def forward(self, x: Tensor) -> Tensor:
        """[B, s, D] -> [B, s, F]"""
        y = F.linear(x, self.weight)
        if self.lora is None:
            return y
        adapted: Tensor = self.lora(y, F.linear(x, self.lora.a.weight))
        return adapted
