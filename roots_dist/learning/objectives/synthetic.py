"""Synthetic sources that proofs learn from instead of files: random documents or rows, equal in every process.

config --proof_objective--> SyntheticObjective, in place of the config's --> testing/, verify/, runs/plan/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from roots_dist.config.records import corpus_tokens, num_sentinels, objective_of, target_seq
from roots_dist.config.schema import Config
from roots_dist.learning.data.batches import Batches, open_source
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.data.tasks import Example, Examples
from roots_dist.learning.objectives import objective_class
from roots_dist.world.batch import IGNORE, MicroBatch, Objective, PackingObjective

ROWS = 64
"""Number of random rows."""
TARGETS = ("targets", "originals", "labels")
"""Fields of a sample that say what is scored."""
UNSCORED = 0.2
"""Share of targets that are left out."""


def random_source(config: Config, name: str = "random") -> Corpus | Examples:
    """Random documents or rows, keyed by the config's seed and by the name."""
    draw = np.random.default_rng([config.train.seed, *name.encode()])
    if not objective_of(config).rows:
        return _corpus(config, draw, name)
    rows = tuple(_row(config, draw) for _ in range(ROWS))
    compared = objective_of(config).has_references
    return Examples(name, rows, references=draw.normal(-20, 3, (ROWS, 2)) if compared else None)


def _corpus(config: Config, draw: np.random.Generator, name: str) -> Corpus:
    """Some 4,000 random tokens of the vocabulary in documents of 2 to 60, or enough for a few samples that are
    longer."""
    documents = max(128, 4 * corpus_tokens(config) // 30)
    lengths = draw.integers(2, 61, size=documents).astype(np.int32)
    stored = draw.integers(config.model.vocab, size=int(lengths.sum()))
    offsets = (np.cumsum(lengths) - lengths) * np.int64(stored.itemsize)
    return Corpus(name, lengths, offsets, np.arange(len(lengths) + 1), stored)


def _row(config: Config, draw: np.random.Generator) -> Example:
    """Draw a row of random tokens and labels. Some rows are longer than a sample.

    The second half of a conversation is the answer; it begins early enough that a sample holds some of it.
    """
    kind, seq, labels = objective_of(config).rows, config.data.seq_length, len(config.finetune.labels)

    def words(least: int, most: int) -> np.ndarray:
        return draw.integers(config.model.vocab, size=int(draw.integers(least, most + 1))).astype(np.int32)

    first = words(2, seq + seq // 4)
    if kind == "labelled texts":
        return Example(first, words(1, seq) if config.finetune.pair_column else None, label=int(draw.integers(labels)))
    if kind == "labelled words":
        marks = np.where(draw.random(len(first)) < 0.3, IGNORE, draw.integers(labels, size=len(first)))
        return Example(first, token_labels=marks.astype(np.int32))
    if kind == "conversations":
        return Example(first, token_labels=_second_half(first))
    if kind == "preferences":
        second = words(2, seq // 2 + seq // 4)
        return Example(first[: len(second) + 3], second, _second_half(first[: len(second) + 3]), _second_half(second))
    return Example(first, words(1, target_seq(config) + 2))


def _second_half(ids: np.ndarray) -> np.ndarray:
    """Marks of an answer that begins early enough that half of a sample holds some of it."""
    return (np.arange(len(ids)) >= max(1, len(ids) // 2)).astype(np.int32)


@dataclass(frozen=True)
class SyntheticObjective:
    """An objective whose sources are random, whatever their paths, and whose samples leave out one target in five, so
    that microbatches differ in what they count."""

    config: Config
    objective: Objective

    @property
    def weights(self) -> Mapping[str, float]:
        return self.objective.weights

    @property
    def perplexity_term(self) -> str | None:
        return self.objective.perplexity_term

    def open(self, path: str) -> Corpus | Examples:
        return random_source(self.config, path)

    def num_samples(self, source: Any) -> int:
        return self.objective.num_samples(source)

    def packed(self, source: Any) -> Any:
        assert isinstance(self.objective, PackingObjective), self.objective
        return self.objective.packed(source)

    def sample(self, source: Any, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        fields = self.objective.sample(source, index, draw)
        targets = {name: np.asarray(fields[name]) for name in TARGETS if name in fields}
        return fields | {n: np.where(draw.random(t.shape) < UNSCORED, IGNORE, t) for n, t in targets.items()}

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return self.objective.counts(batch)


def proof_objective(config: Config) -> SyntheticObjective:
    """The config's objective on random sources, without a tokenizer: some of the ids are the special tokens."""
    specials = synthetic_specials(config.model.vocab, num_sentinels(config))
    objective = objective_class(config)(config, specials)
    return SyntheticObjective(config, objective)


def random_batches(config: Config, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    """This data rank's microbatches of a step, from a random source. The global batch is the same in every layout."""
    objective = proof_objective(config)
    return Batches(
        config, objective, [open_source(objective, "random", config.finetune.packing)], [1.0], dp_rank, dp_size
    ).at(step)
