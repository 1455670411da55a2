"""Baseline model: n-grams with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998, 4.1.6).

    training tokens --count--> Levels 0 … n --log_probabilities(tokens)--> log p of each token, by each order

    p_k(w | h) = max(c(h w) - D(c(h w)), 0) / c(h)
                 + (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h) · p_{k-1}(w | h without its first)

c counts occurrences in the highest order, and distinct tokens before the n-gram in lower orders; Ni(h) is the number of
tokens that follow h with a count of i. p_0 is uniform, so nothing is impossible. A context ends where its document
begins: the token before that is BEFORE, which is never predicted. T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALLBACK = (0.5, 1.0, 1.5)
"""Discounts of an order that lacks n-grams of some count up to 4, as in small or unusual text (KenLM's values)."""
AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class LevelCounts:
    """Counts of one order, int64 [n-grams], and what follows from them."""

    counts: np.ndarray
    totals: np.ndarray
    """float64 [contexts]: c(h)."""
    left: np.ndarray
    """float64 [contexts]: probability that the discounts leave to the lower order."""
    discounts: tuple[float, float, float]


@dataclass(frozen=True)
class Level:
    """All n-grams of length k and their contexts of length k - 1, each as a sorted key of (index of the rest, new
    token)."""

    contexts: np.ndarray
    """int64: index of the shorter context · (V + 1) + the token before it; the one key 0 for length 0."""
    grams: np.ndarray
    """int64: index of the context · (V + 1) + the token that follows."""
    as_highest: LevelCounts
    below: LevelCounts | None
    """Counts for use as a lower order; None for the highest."""


@dataclass(frozen=True)
class Ngrams:
    vocab: int
    levels: tuple[Level, ...]
    """Levels of orders 1, 2 …"""

    def log_probabilities(self, tokens: np.ndarray, starts: np.ndarray, places: np.ndarray) -> np.ndarray:
        """float64 [1 + n, places]: log p of the tokens at `places` of a text, by orders 0 (uniform) to n. `tokens` is
        [T]; `starts` are the starts of documents."""
        parts = (places[i : i + AT_A_TIME] for i in range(0, max(1, len(places)), AT_A_TIME))
        return np.concatenate([np.log(self._probabilities(tokens, starts, part)) for part in parts], 1)

    def _probabilities(self, tokens: np.ndarray, starts: np.ndarray, places: np.ndarray) -> np.ndarray:
        words, depth = tokens[places].astype(np.int64), _depth(starts, places)
        lower = np.full(len(places), 1 / self.vocab)
        found, context = [lower], np.zeros(len(places), np.int64)
        for k, level in enumerate(self.levels):
            if k:
                before = _token_before(tokens, places, depth, k, self.vocab)
                context = _number(level.contexts, _key(context, before, self.vocab))
            gram = _number(level.grams, _key(context, words, self.vocab))
            found.append(_mixed(level.as_highest, context, gram, lower))
            lower = lower if level.below is None else _mixed(level.below, context, gram, lower)
        return np.stack(found)


def count(
    tokens: np.ndarray,
    starts: np.ndarray,
    order: int,
    vocab: int,
    discounts: Sequence[tuple[float, float, float]] | None = None,
) -> Ngrams:
    """Count the n-grams of a text [T] whose documents begin at `starts`. `discounts` are (D1, D2, D3+) of each order
    (default: estimated as in section 4.1.6). Needs about 110 bytes per token for order 3."""
    assert order >= 1 and len(tokens), (order, len(tokens))
    places = np.arange(len(tokens))
    depth = _depth(starts, places)
    contexts, context = np.zeros(1, np.int64), np.zeros(len(tokens), np.int64)
    known: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # contexts, n-grams, how often each occurs
    below: list[np.ndarray] = []  # how many tokens stand before each n-gram of the order below
    shorter = np.zeros(0, np.int64)  # number of the n-gram of the order below that ends at each token
    for k in range(order):
        if k:
            keys = _key(context, _token_before(tokens, places, depth, k, vocab), vocab)
            contexts, context = np.unique(keys, return_inverse=True)
        grams, first, gram, occurrences = np.unique(
            _key(context, tokens.astype(np.int64), vocab), return_index=True, return_inverse=True, return_counts=True
        )
        if k:
            below.append(np.bincount(shorter[first], minlength=len(known[-1][1])))
        known.append((contexts, grams, occurrences))
        shorter = gram
    levels = []
    for k, (contexts, grams, occurrences) in enumerate(known):
        which, given = grams // (vocab + 1), None if discounts is None else discounts[k]
        counted = [_level_counts(c, which, len(contexts), given) for c in (occurrences, *below[k : k + 1])]
        levels.append(Level(contexts, grams, counted[0], counted[1] if len(counted) > 1 else None))
    return Ngrams(vocab, tuple(levels))


def estimate_discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Estimate D1, D2, D3+ from the numbers of n-grams that occur 1, 2, 3 and 4 times (equation 17)."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return found if all(0 < d < i for i, d in enumerate(found, 1)) else FALLBACK


def _level_counts(
    counts: np.ndarray, context: np.ndarray, contexts: int, fixed: tuple[float, float, float] | None
) -> LevelCounts:
    """Counts and discounts of one order. `context` is the index of each n-gram's context."""
    discounts = estimate_discounts(counts) if fixed is None else fixed
    totals = np.bincount(context, counts, contexts)
    taken = np.bincount(context, np.take((0.0, *discounts), np.minimum(counts, 3)), contexts)
    return LevelCounts(counts, totals, taken / totals, discounts)


def _mixed(level: LevelCounts, context: np.ndarray, gram: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """p of each (context, n-gram); an index of -1 means unknown, and the lower order's p is used."""
    count = np.where(gram >= 0, level.counts[gram], 0)
    kept = np.maximum(count - np.take((0.0, *level.discounts), np.minimum(count, 3)), 0) / level.totals[context]
    return np.where(context >= 0, kept + level.left[context] * lower, lower)


def _key(context: np.ndarray, token: np.ndarray, vocab: int) -> np.ndarray:
    """Key of a context and a token; -1 if the context is unknown."""
    return np.where(context >= 0, context * (vocab + 1) + token, -1)


def _number(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each wanted key among the sorted keys; -1 if absent."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


def _depth(starts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Number of tokens of its document before each place."""
    depth: np.ndarray = places - starts[np.searchsorted(starts, places, side="right") - 1]
    return depth


def _token_before(tokens: np.ndarray, places: np.ndarray, depth: np.ndarray, distance: int, vocab: int) -> np.ndarray:
    """Token at `distance` before each place; BEFORE, which has the number V, if that is outside the document."""
    return np.where(depth >= distance, tokens[np.maximum(places - distance, 0)], vocab).astype(np.int64)
