"""Gradient norm of the whole model, equal on every rank and in every layout, and the clipping factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    million numbers is 0.2 % too small. On a CPU they are scalar products of what its cache holds, which takes
    less time than torch's norm in float64 of a float32 tensor.
    """
    totals = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for i, gradients in enumerate(groups):
        if not (counted := _counted(gradients)):
            continue
        if device.type == "cpu":
            totals[i] = torch.stack([_square(block) for block in _blocks(counted, BLOCKS["cpu"])]).sum()
        else:
            totals[i] = torch.stack(torch._foreach_norm(counted, dtype=torch.float64)).square().sum()
    return totals


def _square(block: Tensor) -> Tensor:
    wide = block.double()
    return torch.dot(wide, wide)


def _counted(gradients: Iterable[tuple[Param, Tensor]]) -> list[Tensor]:
    """Return the gradients that this rank counts."""
    return [gradient for param, gradient in gradients if param.is_counted]


BITS, HALF = 36, 26
"""Bits of each of the two whole numbers that a square is cut into: what is below 2^-72 of the largest one is left out.
And those of the lower half of a sum, so that sums of halves of 2^52 numbers fit into 64 bits."""
ROW = 1 << 15
"""Whole numbers whose sum float64 holds exactly."""
BLOCKS = {"cpu": ROW}
"""Kind of device -> numbers that are squared at one time, in float64: a CPU's cache holds them through all passes."""
BLOCK = 1 << 24
"""The same of other devices, to which each operation has to be sent."""


def norm_bytes(sizes: Sequence[int], device: str, is_exact: bool) -> int:
    """Memory that the norm of gradients of so many numbers each takes on this kind of device: for each number of a
    block itself, in float64, and, in an exact run, the whole part of its square."""
    most = BLOCKS.get(device, BLOCK)
    if not is_exact and device != "cpu":
        return 0
    block = most
    if all(size < most for size in sizes):
        some = [torch.empty(size, device="meta") for size in sizes]
        block = max((joined.numel() for joined in _blocks(some, most)), default=0)
    return block * (4 + 8 + 8 * is_exact)


@torch.no_grad()
def exact_group_norms(
    groups: Sequence[Iterable[tuple[Param, Tensor]]], over: Sequence[Axis], device: torch.device
) -> list[float]:
    """The same in whole numbers, whose sum has no order, so that no layout and no cut over data ranks changes a bit.

    Each square is scaled by a power of two so that the largest one of its group is at most 1, and cut into two whole
    numbers of BITS bits. A norm that is not finite is infinite.
    """
    counted = [_counted(gradients) for gradients in groups]
    largest = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for i, gradients in enumerate(counted):
        if held := [gradient for gradient in gradients if gradient.numel()]:  # a data rank's part may be empty
            ends = torch.stack([end for gradient in held for end in torch.aminmax(gradient)])
            largest[i] = ends.abs().max()
    largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)
    for axis in over:
        if axis.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
    scales = [math.ldexp(1.0, math.frexp(value)[1]) if math.isfinite(value) else math.inf for value in largest.tolist()]
    totals = torch.zeros(len(groups), 4, dtype=torch.int64, device=device)
    for i, gradients in enumerate(counted):
        blocks = _blocks(gradients, BLOCKS.get(device.type, BLOCK))
        if rows := [_whole_numbers(block, scales[i]) for block in blocks]:
            sums = torch.cat(rows, 1).to(torch.int64)
            totals[i] = torch.cat([sums >> HALF, sums & (1 << HALF) - 1]).sum(1)
    for axis in over:
        axis.sum_(totals)
    return [_root(row, scale) for scale, row in zip(scales, totals.tolist())]


def _root(totals: Sequence[int], scale: float) -> float:
    """The norm, of the upper halves of the sums of both whole numbers and of their lower halves."""
    if math.isinf(scale):
        return math.inf
    first, second = ((upper << HALF) + lower for upper, lower in zip(totals[:2], totals[2:]))
    return math.sqrt(((first << BITS) + second) / (1 << 2 * BITS)) * scale


def _blocks(gradients: Sequence[Tensor], most: int) -> Iterator[Tensor]:
    """All numbers, flat, at most so many at one time: large tensors in pieces, small ones together."""
    small: list[Tensor] = []
    for flat in (gradient.reshape(-1) for gradient in gradients):
        if flat.numel() >= most:
            yield from flat.split(most)
            continue
        if sum(other.numel() for other in small) + flat.numel() > most:
            yield torch.cat(small)
            small.clear()
        small.append(flat)
    if small:
        yield torch.cat(small)


def _whole_numbers(block: Tensor, scale: float) -> Tensor:
    """float64 [2, rows]: the sums of both whole numbers of each ROW squares, at most 2^36 each, and so exact. All
    factors are powers of two, and the difference is that of a number and its whole part: nothing is rounded."""
    rest = block.double().mul_(2 ** (BITS / 2) / scale).square_()
    rest = F.pad(rest, (0, -rest.numel() % ROW)).view(-1, ROW) if rest.numel() > ROW else rest[None]
    whole = rest.floor()
    return torch.stack([whole.sum(1), rest.sub_(whole).mul_(1 << BITS).floor_().sum(1)])


def total_norm(norms: Iterable[float]) -> float:
    """Norm of all groups together."""
    return math.sqrt(sum(norm * norm for norm in norms))


def clip_factor(norm: float, limit: float) -> float:
    """Factor by which every gradient is multiplied (Pascanu et al. 2013, section 3.2). limit=0 disables clipping."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
