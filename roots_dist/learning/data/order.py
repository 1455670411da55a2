"""The order of samples as pure functions: nothing is shuffled in memory, nothing is saved, any position is available at
once.

    j-th sample of the run --choose_sources--> (source, n-th sample of it) --sample_of--> sample of that source

Called by learning/data/batches.py with the sample numbers of one step, so that resume, data-parallel size and
microbatch size cannot change the order. Knows only numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 8
"""Feistel rounds: each half is mixed four times. Four rounds in all are already pseudorandom (Luby & Rackoff 1988)."""


def mix64(state: np.ndarray | int, index: np.ndarray | int) -> np.ndarray:
    """64 bits for each pair, elementwise: one step of splitmix64 (Steele et al. 2014) from `state`."""
    with np.errstate(over="ignore"):  # wraparound is intended
        x = _unsigned(index) * np.uint64(0x9E3779B97F4A7C15) + _unsigned(state)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = x ^ (x >> np.uint64(31))
        return mixed


def _unsigned(value: np.ndarray | int) -> np.ndarray:
    return np.asarray(value & 0xFFFFFFFFFFFFFFFF if isinstance(value, int) else value).astype(np.uint64)


def fraction(seed: int, index: np.ndarray | int) -> np.ndarray:
    """A number in [0, 1) for each index, drawn with `seed`."""
    return (mix64(mix64(0, seed), index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(index: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """Apply a pseudorandom permutation of range(size) to each index. int64; needs no memory of `size`.

    A Feistel network over pairs of digits (left < a, right < b) with a · b just above size, so that few values fall
    outside; those are permuted again until they are inside (cycle walking, Black & Rogaway 2002, section 3).
    """
    index = np.asarray(index, dtype=np.int64)
    assert size >= 1 and (index.size == 0 or 0 <= index.min() <= index.max() < size), (index, size)
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    out = index.copy()
    key = np.broadcast_to(_unsigned(key), index.shape)
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = np.divmod(out[outside], b)
        for r in range(ROUNDS):
            stir = mix64(mix64(key[outside], r), right if r % 2 == 0 else left) >> np.uint64(1)
            if r % 2 == 0:
                left = (left + (stir % np.uint64(a)).astype(np.int64)) % a
            else:
                right = (right + (stir % np.uint64(b)).astype(np.int64)) % b
        out[outside] = left * b + right
        outside = out >= size
    return out


def sample_of(positions: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Sample at each position of an endless sequence of epochs, each with its own permutation."""
    epoch, index = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    return permuted(index, num_samples, mix64(mix64(1, seed), epoch))


def choose_sources(start: int, count: int, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The source of sample j and its index among the samples of that source, for each j in [start, start + count).

    The t-th sample of source k is due at (t + ½) / share_k, and samples come in the order in which they are due: the
    apportionment of Webster and Sainte-Laguë at every prefix. After j samples source k has provided share_k · j ± (½ +
    share_k · K / 2). The number of samples due before a point has a closed form, so the cost does not grow with start.
    """
    share = np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    slack = 2 * len(share) + 1  # of the samples due before x, source k has share_k · x ± ½, and ± 1 for the rounding
    taken = _about_due_before(max(0.0, float(start - slack)), share)
    needed = _about_due_before(float(start + count + slack), share)
    which = np.repeat(np.arange(len(share)), needed - taken)
    nth = np.concatenate([np.arange(low, high) for low, high in zip(taken, needed)])
    order = np.lexsort((which, (nth + 0.5) / share[which]))
    skip = start - int(taken.sum())
    assert skip >= 0 and skip + count <= len(order), (start, count, weights)
    chosen = order[skip : skip + count]
    return which[chosen], nth[chosen]


def _about_due_before(point: float, share: np.ndarray) -> np.ndarray:
    """The number of t with (t + ½) / share < point for each source, or one more or less where both sides are equal but
    for rounding."""
    return np.floor(point * share + 0.5).astype(np.int64)
