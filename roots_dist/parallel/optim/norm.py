"""Gradient norm of the whole model, equal on every rank and in every layout, and the clipping factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
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
    must already be summed over all other axes.
    """
    totals = group_squares(groups, device)
    for axis in over:
        axis.sum_(totals)
    return list(map(math.sqrt, totals.tolist()))


def group_squares(groups: Sequence[Iterable[tuple[Param, Tensor]]], device: torch.device) -> Tensor:
    """float64 [groups]: the square of each group's norm, as far as this rank counts it; not read by the host.

    Sums are in float64: in float32 torch adds the squares of a CPU tensor one after the other, and the norm of thirty
    million numbers is 0.2 % too small.
    """
    totals = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for i, gradients in enumerate(groups):
        if counted := _counted(gradients):
            totals[i] = torch.stack(torch._foreach_norm(counted, dtype=torch.float64)).square().sum()
    return totals


def _counted(gradients: Iterable[tuple[Param, Tensor]]) -> list[Tensor]:
    """Return the gradients that this rank counts."""
    return [gradient for param, gradient in gradients if param.is_counted]


BITS, LEVELS = 24, 3
"""A square is cut into so many whole numbers of so many bits: squares below 2^-72 of the largest one are left out."""
BLOCKS = {"cpu": 1 << 15}
"""Kind of device -> numbers that are squared at one time, in float64: a CPU's cache holds them through all passes."""
BLOCK = 1 << 24
"""The same of other devices, to which each operation has to be sent."""


@torch.no_grad()
def exact_group_norms(
    groups: Sequence[Iterable[tuple[Param, Tensor]]], over: Sequence[Axis], device: torch.device
) -> list[float]:
    """The same in whole numbers, whose sum has no order, so that no layout and no cut over data ranks changes a bit.

    Each square is scaled by a power of two so that the largest one of its group is at most 1, and cut into LEVELS whole
    numbers of BITS bits, which fit into the sums of 2^38 of them. A norm that is not finite is infinite.
    """
    counted = [_counted(gradients) for gradients in groups]
    largest = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for i, gradients in enumerate(counted):
        if held := [gradient for gradient in gradients if gradient.numel()]:  # a data rank's part may be empty
            largest[i] = torch.stack([gradient.abs().max().double() for gradient in held]).max()
    largest = largest.nan_to_num(nan=math.inf)
    for axis in over:
        if axis.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
    scales = [math.ldexp(1.0, math.frexp(value)[1]) if math.isfinite(value) else math.inf for value in largest.tolist()]
    totals = torch.zeros(len(groups), LEVELS, dtype=torch.int64, device=device)
    block = BLOCKS.get(device.type, BLOCK)
    for i, gradients in enumerate(counted):
        for part in (part for g in gradients for part in g.reshape(-1).split(block)):
            rest = (part.double() / scales[i]).square_()
            for level in range(LEVELS):
                rest *= 1 << BITS
                whole = rest.floor()
                rest -= whole
                totals[i, level] += whole.sum().to(torch.int64)  # of at most 2^24 numbers below 2^24: exact
    for axis in over:
        axis.sum_(totals)
    return [
        math.inf if math.isinf(scale) else math.sqrt(sum(n / 2 ** (BITS * (i + 1)) for i, n in enumerate(row))) * scale
        for scale, row in zip(scales, totals.tolist())
    ]


def total_norm(norms: Iterable[float]) -> float:
    """Norm of all groups together."""
    return math.sqrt(sum(norm * norm for norm in norms))


def clip_factor(norm: float, limit: float) -> float:
    """Factor by which every gradient is multiplied (Pascanu et al. 2013, section 3.2). limit=0 disables clipping."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
