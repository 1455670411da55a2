"""Gradient norm of the whole model, equal on every rank and in every layout, and the clipping factor."""

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
    """Euclidean norm of each group of gradients.

    A sharded parameter contributes its slice from each tensor rank, a replicated one from a single rank, a tied copy
    nothing. Every rank passes the same groups, some of which may be empty there. `over` are the axes whose ranks hold
    different parts: mesh.model, and mesh.dp_cp where gradients are sharded; the call is collective over them. Gradients
    must already be summed over all other axes. Sums are in float64: in float32 torch adds the squares of a CPU tensor
    one after the other, and the norm of thirty million numbers is 0.2 % too small.
    """
    totals = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for i, gradients in enumerate(groups):
        counted = [gradient for param, gradient in gradients if param.is_counted]
        if counted:
            totals[i] = torch.stack(torch._foreach_norm(counted, dtype=torch.float64)).square().sum()
    for axis in over:
        axis.sum_(totals)
    return list(map(math.sqrt, totals.tolist()))


def total_norm(norms: Iterable[float]) -> float:
    """Norm of all groups together."""
    return math.sqrt(sum(norm * norm for norm in norms))


def clip_factor(norm: float, limit: float) -> float:
    """Factor by which every gradient is multiplied (Pascanu et al. 2013, section 3.2). limit=0 disables clipping."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
