"""Payloads that all tensor ranks of a stage hold alike are sent in parts: each sends one, and the receivers, which are
neighbours in a node, gather the whole (scatter/gather: Narayanan et al. 2021, section 4.1).

    tp 0   a b c d  --a b-->  a b  ⎫
                                   ⎬ gather over tp --> a b c d on both
    tp 1   a b c d  --c d-->  c d  ⎭
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from roots_dist.world.mesh import Axis


def part_length(shape: tuple[int, ...], axis: Axis) -> int:
    """Number of elements of a rank's part; the last part may end in zeros."""
    return -(-math.prod(shape) // axis.size)


def part_of(whole: Tensor, axis: Axis) -> Tensor:
    """This rank's part, flat and a copy, so that the whole need not live until it has been sent; the whole itself if no
    other rank has it."""
    if axis.size == 1:
        return whole.contiguous()
    length = part_length(whole.shape, axis)
    part = whole.reshape(-1)[axis.rank * length : (axis.rank + 1) * length]
    return part.clone() if part.numel() == length else F.pad(part, (0, length - part.numel()))


def empty_part(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, axis: Axis) -> Tensor:
    """Allocate the tensor that receives a part."""
    return torch.empty(shape if axis.size == 1 else (part_length(shape, axis),), dtype=dtype, device=device)


def gathered(parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], axis: Axis) -> dict[str, Tensor]:
    """The payload, from the parts of it that have arrived on each rank. Collective over the axis."""
    if axis.size == 1:
        return dict(parts)
    payload = {}
    for name in sorted(parts):
        whole = parts[name].new_empty(axis.size * parts[name].numel())
        dist.all_gather_into_tensor(whole, parts[name], group=axis.group)
        payload[name] = whole[: math.prod(shapes[name])].view(shapes[name])
    return payload
