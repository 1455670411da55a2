"""What proofs learn from in place of files: random documents, or random rows of a task, the same in every process.

    config --random_source--> Corpus | Examples --> testing/parity.py, through the objective's own samples
"""

from __future__ import annotations

import numpy as np

from roots_dist.config.schema import Config
from roots_dist.config.sizes import target_seq
from roots_dist.config.special_tokens import TASKS
from roots_dist.data.store import Corpus
from roots_dist.data.tasks import Example, Examples
from roots_dist.objectives.base import IGNORE

ROWS = 64


def random_source(config: Config) -> Corpus | Examples:
    """Keyed by the config's seed."""
    draw = np.random.default_rng(config.train.seed)
    return Examples("random", tuple(_row(config, draw) for _ in range(ROWS))) if config.objective.name in TASKS else _corpus(config, draw)


def _corpus(config: Config, draw: np.random.Generator) -> Corpus:
    """4,000 random tokens of the vocabulary, in documents of 2 to 60."""
    lengths = draw.integers(2, 61, size=128).astype(np.int32)
    stored = draw.integers(config.model.vocab, size=int(lengths.sum()))
    offsets = (np.cumsum(lengths) - lengths) * np.int64(stored.itemsize)
    return Corpus("random", lengths, offsets, np.arange(len(lengths) + 1), stored)


def _row(config: Config, draw: np.random.Generator) -> Example:
    """Of any length, some longer than a sample; of a conversation the second half is the answer, and begins in time."""
    name, seq, labels = config.objective.name, config.data.seq, len(config.finetune.labels)

    def words(least: int, most: int) -> np.ndarray:
        return draw.integers(config.model.vocab, size=int(draw.integers(least, most + 1))).astype(np.int32)

    first = words(2, seq + seq // 4)
    if name == "classify":
        return Example(first, words(1, seq) if config.finetune.pair else None, label=int(draw.integers(labels)))
    if name == "tag":
        marks = np.where(draw.random(len(first)) < 0.3, IGNORE, draw.integers(labels, size=len(first)))
        return Example(first, marks=marks.astype(np.int32))
    if name == "instruct":
        return Example(first, marks=(np.arange(len(first)) >= len(first) // 2).astype(np.int32))
    return Example(first, words(1, target_seq(config) + 2))
