"""Tensors of several parameters end to end in one flat tensor, which is cut into equal parts: one message for all of
them, and arithmetic that says which part holds what.

    params  |--- query ---|--- key ---|-- bias --|        each begins at a multiple of ALIGN
    parts   |----- rank 0 -----|----- rank 1 -----|       of equal length, whatever they cut through
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from roots_dist.parallel.zero.collectives import start_all_gather
from roots_dist.world.mesh import Axis
from roots_dist.world.sharding import Param

ALIGN = 64
"""Numbers at whose multiples parameters and parts begin: kernels read whole vectors, which begin at multiples of 16
bytes or more."""


@dataclass(frozen=True, eq=False)
class Flat:
    """The layout of a flat tensor over the ranks of an axis."""

    params: tuple[Param, ...]
    axis: Axis
    """Axis of size 1 if nothing is cut."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(torch.Size(p.spec.local_shape(p.tp)).numel() for p in self.params)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The offset of each parameter, in elements."""
        starts = [0]
        for size in self.sizes:
            starts.append(_rounded_up(starts[-1] + size))
        return tuple(starts[:-1])

    @cached_property
    def part_length(self) -> int:
        """Number of elements of a part."""
        end = self.starts[-1] + self.sizes[-1]
        return _rounded_up(-(-end // self.axis.size))

    @property
    def length(self) -> int:
        """Number of elements of all parts: those of the parameters, and some zeros."""
        return self.part_length * self.axis.size

    @property
    def mine(self) -> slice:
        """This rank's part of the flat tensor."""
        return slice(self.axis.rank * self.part_length, (self.axis.rank + 1) * self.part_length)

    def span(self, index: int, rank: int | None = None) -> slice:
        """Elements of a parameter (counted in itself) in the part of a rank, by default this one."""
        first = (self.axis.rank if rank is None else rank) * self.part_length - self.starts[index]
        size = self.sizes[index]
        return slice(min(max(0, first), size), min(max(0, first + self.part_length), size))

    def of_part(self, index: int, part: Tensor) -> Tensor:
        """The elements of a parameter in this rank's part, as a view: one-dimensional, and often empty."""
        span, offset = self.span(index), self.starts[index] - self.axis.rank * self.part_length
        return part[offset + span.start : offset + span.stop] if span.stop > span.start else part[:0]

    def views(self, whole: Tensor) -> list[Tensor]:
        """The parameters in a flat tensor [length], as views in their shapes."""
        return [
            whole[start : start + size].view(p.spec.local_shape(p.tp))
            for p, start, size in zip(self.params, self.starts, self.sizes)
        ]

    def joined(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """[length]: the tensors of all parameters end to end, zeros for those that are None."""
        device = self.params[0].tensor.device
        rows: list[Tensor] = []
        for tensor, start, end in zip(tensors, self.starts, (*self.starts[1:], self.length)):
            row = torch.empty(0, dtype=dtype, device=device) if tensor is None else tensor.reshape(-1)
            rows.append(row)
            if end - start > row.numel():
                rows.append(torch.zeros(end - start - row.numel(), dtype=dtype, device=device))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def gathered(self, index: int, mine: Tensor) -> Tensor:
        """A parameter in its shape, a copy, from what each rank holds of it (`of_part`). Collective over the axis."""
        spans = [self.span(index, rank) for rank in range(self.axis.size)]
        counts = [span.stop - span.start for span in spans]
        row = mine.new_zeros(max(counts))
        row[: mine.numel()] = mine.reshape(-1)
        rows = start_all_gather(row.new_empty(row.numel() * self.axis.size), row, self.axis).wait()
        parts = [part[:count] for part, count in zip(rows.chunk(self.axis.size), counts)]
        p = self.params[index]
        return torch.cat(parts).view(p.spec.local_shape(p.tp))


def _rounded_up(number: int) -> int:
    return -(-number // ALIGN) * ALIGN
