"""Several rows in one sample, each with attention and positions of its own, so that short rows do not cost a sample of
padding each.

    lengths of the rows --pack--> [rows of a sample] --Packs, a source like Examples--> objectives/instruct.py

Best-fit decreasing: the longest rows first, each into the fullest sample that has room for it (Johnson 1973: at most
11/9 of the fewest samples, and two). The result depends on the lengths alone, so that every process packs alike.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from roots_dist.learning.data.tasks import Example, Examples


@dataclass(frozen=True, eq=False)
class Packs:
    """The rows of a file, packed."""

    examples: Examples
    packs: tuple[tuple[int, ...], ...]
    """Numbers of the rows in each sample."""

    @property
    def prefix(self) -> str:
        return self.examples.prefix

    def __len__(self) -> int:
        return len(self.packs)

    def rows_of(self, index: int) -> list[Example]:
        """The rows of a sample."""
        return [self.examples.rows[i] for i in self.packs[index]]


def pack(lengths: Sequence[int], room: int) -> list[tuple[int, ...]]:
    """Share the rows among samples with so much room: the numbers of the rows in each. No length is above the room.

    Takes a time of rows × log(room): samples with equal room left are interchangeable.
    """
    assert all(0 < length <= room for length in lengths), (min(lengths), max(lengths), room)
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> numbers of the packs that have it
    rooms: list[int] = []  # those that some pack has left, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, lengths[i])
        if place == len(rooms):
            number, left = len(packs), room
            packs.append([])
        else:
            left = rooms[place]
            number = open_packs[left].pop()
            if not open_packs[left]:
                del open_packs[left], rooms[place]
        packs[number].append(i)
        left -= lengths[i]
        if left:
            if left not in open_packs:
                insort(rooms, left)
            open_packs.setdefault(left, []).append(number)
    return [tuple(sorted(numbers)) for numbers in packs]
