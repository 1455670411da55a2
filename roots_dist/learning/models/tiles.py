"""The part of queries × keys that attention computes, as rectangles that fused kernels know: pure arithmetic.

    Pattern --tiles--> rectangles --fused_attention.py--> kernels

A mask of S × S numbers is never made: what lies outside of the rectangles is not computed, and on their edges stands
nothing, a triangle, or a band of a few rows that is the same for all of them. Positions are global.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Edge(Enum):
    """The keys of a part that a query of it does not see."""

    NONE = "none"
    """No key: a query sees all of them."""
    CAUSAL = "causal"
    """Keys after it. The part's keys are those of its queries."""
    BAND = "band"
    """Keys after it, and those that have left the window; what it sees may have a bias. The last query is at the last
    key."""


@dataclass(frozen=True)
class Part:
    keys: range
    edge: Edge


@dataclass(frozen=True)
class Tile:
    """Some queries and all keys that any of them sees, in one part, or in two that are merged by their log-sum-exp."""

    rows: slice
    """Sequences."""
    queries: range
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Pattern:
    """The keys that each query sees."""

    queries: range
    keys: range
    """The keys that exist. If causal, the last one is that of the last query."""
    causal: bool
    documents: Sequence[Sequence[range]] | None = None
    """The ranges within which attention stays, for each sequence; together they are all positions. None if each
    sequence is one range."""
    window: int | None = None
    """Number of keys that a query sees, its own included. Only if causal."""
    biased: bool = False
    """True if each pair has a bias by its distance. Only if causal."""

    def __post_init__(self) -> None:
        assert self.causal or not (self.biased or self.window), "windows and biases look back only"
        assert not self.causal or self.queries.stop == self.keys.stop, self

    def pairs(self, sequence: int) -> Iterator[tuple[range, range]]:
        """Queries and keys of each document of a sequence that has queries."""
        everything = range(max(self.queries.stop, self.keys.stop))
        for document in self.documents[sequence] if self.documents else [everything]:
            if queries := _both(self.queries, document):
                yield queries, _both(self.keys, document)

    def tiles(self, block: int) -> tuple[Tile, ...]:
        """Tiles of all queries, in order, sequence by sequence; one run for all sequences where nothing tells them
        apart. block: the most queries of a tile with a band."""
        alike = self.documents is None or len(set(map(tuple, self.documents))) == 1
        rows = 1 if alike else len(self.documents or ())
        return tuple(
            tile
            for row in range(rows)
            for queries, keys in self.pairs(row)
            for tile in self._tiles_of(slice(None) if alike else slice(row, row + 1), queries, keys, block)
        )

    def _tiles_of(self, rows: slice, queries: range, keys: range, block: int) -> Iterator[Tile]:
        """Yield the tiles of one document."""
        if not self.causal:
            yield Tile(rows, queries, (Part(keys, Edge.NONE),))
            return
        last = queries.start if self.biased else queries.stop if self.window is None else keys.start + self.window
        whole = range(queries.start, max(queries.start, min(queries.stop, last)))  # these see all keys before them
        before, own = range(keys.start, whole.start), Part(whole, Edge.CAUSAL)
        if whole:
            yield Tile(rows, whole, (Part(before, Edge.NONE), own) if before else (own,))
        for start in range(whole.stop, queries.stop, block):
            some = range(start, min(start + block, queries.stop))
            first = keys.start if self.window is None else max(keys.start, start - self.window + 1)
            yield Tile(rows, some, (Part(range(first, some.stop), Edge.BAND),))


def _both(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))
