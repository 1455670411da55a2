"""What a linear layer has beside its frozen matrix when it is adapted: two thin matrices (Hu et al. 2021, section 4.1).

    x --a--> low [B, S, R] --b--> added to the layer's output, times alpha/rank

b is zero at first, so that training begins with the model as it was; a is drawn so that `low` is as large as x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.world.mesh import Axis
from roots_dist.world.sharding import ShardSpec, declare


class LoraMatrix(nn.Module):
    def __init__(self, spec: ShardSpec, tp: Axis):
        super().__init__()
        self.weight = declare(self, "weight", spec, tp)


class Adapter(nn.Module):
    """The layer multiplies by `a` together with its own matrix; here the rest is done."""

    def __init__(self, a: ShardSpec, b: ShardSpec, scale: float, tp: Axis):
        super().__init__()
        self.a, self.b, self.scale = LoraMatrix(a, tp), LoraMatrix(b, tp), scale

    def forward(self, y: Tensor, low: Tensor) -> Tensor:
        return y.add(F.linear(low, self.b.weight), alpha=self.scale)
