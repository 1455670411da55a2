"""Tiles of attention: every visible pair of a query and a key in exactly one tile, and nearly nothing else."""

import itertools
from dataclasses import replace

import pytest
import torch

from roots_dist.learning.models.tiles import Edge, Pattern
from roots_dist.world.batch import PADDING, KVCache, MicroBatch, Term, added

DOCUMENTS = {
    "none": None,
    "borders": ((range(5), range(5, 6), range(6, 40)), (range(40),), (range(17), range(17, 40))),
    "the same borders": ((range(13), range(13, 40)),) * 3,
}


def visible(pattern: Pattern, row: int) -> set[tuple[int, int]]:
    """By the definition, pair by pair."""
    whole = [range(40)]
    documents = pattern.documents[row] if pattern.documents else whole
    return {
        (q, k)
        for q, k in itertools.product(pattern.queries, pattern.keys)
        if any(q in document and k in document for document in documents)
        and (not pattern.causal or k <= q)
        and (pattern.window is None or q - k < pattern.window)
    }


def computed(pattern: Pattern, block: int) -> tuple[list[list[tuple[int, int]]], int]:
    """For each sequence the pairs of the tiles that no edge hides, and the pairs that kernels go through."""
    found, area = [[], [], []], 0
    for tile in pattern.tiles(block):
        for part in tile.parts:
            pairs = list(itertools.product(tile.queries, part.keys))
            area += len(pairs)
            if part.edge is not Edge.NONE:
                assert tile.queries.stop == part.keys.stop
                pairs = [(q, k) for q, k in pairs if k <= q]
            if part.edge is Edge.CAUSAL:
                assert tile.queries == part.keys
            if part.edge is Edge.BAND and pattern.window is not None:
                assert len(tile.queries) <= block
                pairs = [(q, k) for q, k in pairs if q - k < pattern.window]
            for row in range(3)[tile.rows]:
                found[row] += pairs
    return found, area


KINDS = [(None, False), (6, False), (1, False), (39, False), (None, True), (9, True)]
CASES = [
    *((queries, 0, *kind) for queries in ((0, 40), (20, 40), (10, 20)) for kind in KINDS),
    ((33, 40), 29, 6, False),  # only a cache of a block with a window has lost its first keys
]
"""Queries, the first key that there is, window, and whether scores have a bias."""


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("queries, first, window, biased", CASES)
def test_each_visible_pair_is_in_one_tile(documents, queries, first, window, biased):
    pattern = Pattern(
        range(*queries), range(first, queries[1]), True, DOCUMENTS[documents], window=window, biased=biased
    )
    found, _ = computed(pattern, 4)
    for row, pairs in enumerate(found):
        assert len(pairs) == len(set(pairs)) and set(pairs) == visible(pattern, row)
    in_order = [q for tile in pattern.tiles(4) if 1 in range(3)[tile.rows] for q in tile.queries]
    assert in_order == list(pattern.queries)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("queries", [(0, 40), (10, 20)])
def test_without_a_causal_mask_documents_are_read_whole(documents, queries):
    pattern = Pattern(range(*queries), range(40), False, DOCUMENTS[documents])
    found, _ = computed(pattern, 4)
    for row, pairs in enumerate(found):
        assert len(pairs) == len(set(pairs)) and set(pairs) == visible(pattern, row)


def test_what_is_computed_grows_with_the_length_alone():
    """Documents and windows keep their length: twice the sequence, twice the pairs."""
    areas = {}
    for size in (512, 1024):
        positions = range(size)
        documents = (tuple(range(start, start + 64) for start in range(0, size, 64)),) * 3
        areas["documents", size] = computed(Pattern(positions, positions, True, documents), 32)[1]
        areas["window", size] = computed(Pattern(positions, positions, True, window=64), 32)[1]
    assert areas["documents", 1024] == 2 * areas["documents", 512]
    assert areas["window", 1024] < 2.2 * areas["window", 512] < 2.2 * 512 * (64 + 32)


def test_documents_are_runs_of_ids_that_do_not_come_back():
    """They are known before a batch is moved."""
    ids = torch.tensor([[4, 4, 4, 7, 7, PADDING], [0, 0, 0, 0, 0, 0], [2, 1, 1, 1, 9, 9]])
    batch = MicroBatch(tokens=ids, sample_ids=torch.arange(3), document_ids=ids)
    moved = batch.to(torch.device("meta"))
    assert moved.document_ranges == (
        (range(3), range(3, 5), range(5, 6)),
        (range(6),),
        (range(1), range(1, 4), range(4, 6)),
    )
    assert moved.to(torch.device("meta")) is not None and moved.document_ids.device.type == "meta"
    ids[0, 5] = 4
    assert batch.to(torch.device("meta")).document_ranges is None


def test_parts_of_a_term_are_added_with_what_was_hit():
    """Context shards of a rank of an exact run."""
    parts = [Term("clm", torch.tensor(n + 0.5), torch.tensor(n), torch.tensor(n // 2)) for n in (3, 8)]
    whole = added(parts)
    assert (whole.sum.item(), whole.count.item(), whole.hits.item()) == (
        12.0,
        11,
        5,
    ) and whole.sum.dtype == torch.float64
    assert added([replace(part, hits=None) for part in parts]).hits is None


def test_a_cache_drops_the_keys_that_no_later_query_sees():
    cache, numbers = KVCache(), torch.arange(20.0).view(1, 1, 20, 1)
    sizes = []
    for start, stop in ((0, 12), (12, 13), (13, 16), (16, 17)):
        new = numbers[:, :, start:stop]
        k, v = cache.extend("a", new, -new, keep=3)
        assert torch.equal(k, numbers[:, :, max(0, start - 3) : stop]) and torch.equal(v, -k)
        kept = cache.get("a")[0]
        sizes.append((kept.shape[2], kept.untyped_storage().nbytes() // 4))
    assert sizes == [(3, 3), (3, 4), (3, 6), (3, 4)]
