"""LoRA adapter of a linear layer: two low-rank matrices beside its frozen weight (Hu et al. 2021, section 4.1).

    x --a--> low [B, S, R] --b--> added to the layer's output, times alpha/rank

b is initially zero, so that training starts from the unchanged model; a is drawn so that `low` is as large as x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import contiguous_gradient
from roots_dist.world.mesh import Axis
from roots_dist.world.sharding import ShardSpec, declare


class LoraMatrix(nn.Module):
    """One of the two low-rank matrices."""

    def __init__(self, spec: ShardSpec, tp: Axis):
        super().__init__()
        self.weight = declare(self, "weight", spec, tp)


class Adapter(nn.Module):
    """Adds the low-rank update to a layer's output. The layer multiplies by `a` together with its own weight."""

    def __init__(self, a: ShardSpec, b: ShardSpec, scale: float, tp: TensorParallel):
        super().__init__()
        self.a, self.b, self.scale, self.tp = LoraMatrix(a, tp.axis), LoraMatrix(b, tp.axis), scale, tp

    def forward(self, y: Tensor, low: Tensor, b: Tensor | None = None) -> Tensor:
        """b: the part of the second matrix that y belongs to; None: all that this rank holds."""
        update = F.linear(low, self.b.weight if b is None else b)
        if self.tp.exact is not None:  # a sum's order follows the strides
            update = contiguous_gradient(update)
        return y.add(update, alpha=self.scale)
