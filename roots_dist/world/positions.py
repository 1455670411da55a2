"""The positions of a sequence that a rank holds: cut over context ranks, and over tensor ranks (sequence parallelism).

    S positions --zigzag--> chunks r and 2·cp-1-r of 2·cp, for context rank r --part--> those of one tensor rank

A causal query sees all keys before it, so the end of a text costs more than its beginning. With an early and a late
chunk each, all context ranks have the same number of pairs of a query and a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Positions of a whole sequence, in the order in which a rank holds them: one range, or several."""

    ranges: tuple[range, ...]

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    @staticmethod
    def together(several: Iterable[Positions]) -> Positions:
        """All of them, one after another."""
        return Positions(tuple(r for positions in several for r in positions.ranges))

    def part(self, index: int, parts: int) -> Positions:
        """One of `parts` equally long runs of these positions."""
        size, rest = divmod(len(self), parts)
        assert rest == 0, (self, parts)
        return Positions(tuple(_within(self.ranges, range(index * size, (index + 1) * size))))

    def after(self, start: int) -> Positions:
        """The same positions of a sequence that goes on after `start` others."""
        return Positions(tuple(range(r.start + start, r.stop + start) for r in self.ranges))

    def of(self, whole: Tensor, dim: int = 1) -> Tensor:
        """The entries of a whole tensor at these positions of dimension `dim`."""
        parts = [whole.narrow(dim, r.start, len(r)) for r in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def places(self, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """The positions as numbers, [len(self)]."""
        parts = [torch.arange(r.start, r.stop, device=device, dtype=dtype) for r in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def find(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The index of each place among these positions (0 if it is not one of them), and a mask that is True where it
        is one. Both have the shape of `places`."""
        index, held, before = torch.zeros_like(places), torch.zeros_like(places, dtype=torch.bool), 0
        for r in self.ranges:
            here = (places >= r.start) & (places < r.stop)
            index = torch.where(here, places - r.start + before, index)
            held, before = held | here, before + len(r)
        return index, held


def _within(ranges: tuple[range, ...], wanted: range) -> Iterator[range]:
    """Yield the positions at the indices `wanted` of the concatenated `ranges`, as ranges."""
    before = 0
    for r in ranges:
        part = r[max(0, wanted.start - before) : max(0, wanted.stop - before)]
        if len(part):
            yield part
        before += len(r)


def zigzag(seq: int, rank: int, size: int) -> Positions:
    """Positions of a context rank: chunks `rank` and 2·size-1-rank of 2·size. All of them on a single rank."""
    if size == 1:
        return Positions((range(seq),))
    chunk, rest = divmod(seq, 2 * size)
    assert rest == 0, (seq, size)
    return Positions(tuple(range(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)))
