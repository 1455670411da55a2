"""The norm of the whole model's gradient, equal on every rank and in every layout, and what clipping makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from roots_dist.mesh import Axis
from roots_dist.sharding import Param


def global_norm(gradients: Iterable[tuple[Param, Tensor]], over: Sequence[Axis], device: torch.device) -> float:
    """Euclidean norm. A cut parameter contributes its slice from each tensor rank, a whole one from one rank only, a
    tied copy nothing.

    `over`: the axes whose ranks hold different parts; mesh.model, and mesh.dp where gradients are sharded. Collective
    over them. Gradients are already summed over whatever else. Sums run in float32 (float64 for float64) within a
    tensor and in float64 between tensors.
    """
    counted = [gradient for param, gradient in gradients if param.counts_here]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if counted:
        dtype = torch.float64 if counted[0].dtype == torch.float64 else torch.float32
        total += torch.stack(torch._foreach_norm(counted, dtype=dtype)).double().square().sum()
    for axis in over:
        axis.sum_(total)
    return math.sqrt(total.item())


def clip_factor(norm: float, limit: float) -> float:
    """What every gradient is multiplied by (Pascanu et al. 2013, section 3.2). limit 0: no clipping."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
