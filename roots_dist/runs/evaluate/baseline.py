"""Baseline: loss of n-grams of the training text on the held-out text, for the same targets and tokens as the model.

    data.train --ngram.count--> Ngrams --log p of every held-out target--> [Baseline], orders 0 (uniform) to n

Runs on one rank without torch; no other rank is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from roots_dist.config.schema import Config
from roots_dist.config.sections import Source
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.store import Corpus
from roots_dist.runs.evaluate.ngram import count

NAMES = ("uniform", "unigram", "bigram", "trigram")


class Baseline(NamedTuple):
    name: str
    loss: float
    """Nats per target."""


class NgramBaselines(NamedTuple):
    orders: list[Baseline]
    used: int
    """Number of training tokens used."""
    available: int


def ngram_baselines(config: Config, held_out: Batches, sequences: int, order: int, most: int) -> NgramBaselines:
    """Baselines from at most `most` training tokens: the beginning of each corpus, in proportion to their sizes."""
    tokens, starts, available = _beginnings(config.data.train, most)
    model = count(tokens, starts, order, config.model.vocab)
    sums, targets = np.zeros(order + 1), 0
    for source, places in _places(held_out, sequences, config.data.seq_length):
        found = model.log_probabilities(source.tokens(0, source.num_tokens), source.bounds[:-1], places)
        sums, targets = sums - found.sum(1), targets + len(places)
    orders = [
        Baseline(NAMES[k] if k < len(NAMES) else f"{k}-gram", float(loss)) for k, loss in enumerate(sums / targets)
    ]
    return NgramBaselines(orders, len(tokens), available)


def _beginnings(sources: Sequence[Source], most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens, the start of each document in them, and the number of tokens in all corpora."""
    corpora = [Corpus.open(source.path) for source in sources]
    available = sum(corpus.num_tokens for corpus in corpora)
    parts, starts, before = [], [], 0
    for corpus in corpora:
        size = min(corpus.num_tokens, -(-most * corpus.num_tokens // available))
        bounds = corpus.bounds[:-1]
        parts.append(corpus.tokens(0, size))
        starts.append(before + bounds[bounds < size])
        before += size
    return np.concatenate(parts), np.concatenate(starts), available


def _places(held_out: Batches, sequences: int, seq: int) -> list[tuple[Corpus, np.ndarray]]:
    """Each source, with the positions of the targets of its causal samples (learning/objectives/clm.py): all tokens of
    a window but the first, and the one after it."""
    found: dict[int, tuple[Corpus, list[int]]] = {}
    for source, index in held_out.evaluation_samples(sequences):
        found.setdefault(id(source), (source, []))[1].append(index)
    return [
        (source, (np.array(which)[:, None] * seq + np.arange(1, seq + 1)).ravel()) for source, which in found.values()
    ]
