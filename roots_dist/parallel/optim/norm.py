"""The norm of the whole model's gradient, equal on every rank and in every layout, and what clipping makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from roots_dist.world.mesh import Axis
from roots_dist.world.sharding import Param


def group_norms(
    groups: Sequence[Iterable[tuple[Param, Tensor]]], over: Sequence[Axis], device: torch.device
) -> list[float]:
    """Euclidean norm of each group of gradients. A cut parameter contributes its slice from each tensor rank, a whole
    one from one rank only, a tied copy nothing.

    Every rank names the same groups, of some of which it may hold nothing. `over`: the axes whose ranks hold different
    parts; mesh.model, and mesh.dp where gradients are sharded. Collective over them. Gradients are already summed over
    whatever else. Sums run in float32 (float64 for float64) within a tensor and in float64 between tensors.
    """
    totals = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for i, gradients in enumerate(groups):
        counted = [gradient for param, gradient in gradients if param.counts_here]
        if counted:
            dtype = torch.float64 if counted[0].dtype == torch.float64 else torch.float32
            totals[i] = torch.stack(torch._foreach_norm(counted, dtype=dtype)).double().square().sum()
    for axis in over:
        axis.sum_(totals)
    return list(map(math.sqrt, totals.tolist()))


def norm_of(norms: Iterable[float]) -> float:
    """Of all together."""
    return math.sqrt(sum(norm * norm for norm in norms))


def clip_factor(norm: float, limit: float) -> float:
    """What every gradient is multiplied by (Pascanu et al. 2013, section 3.2). limit 0: no clipping."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
