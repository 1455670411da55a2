"""What proofs learn from in place of files: random documents, or random rows of a task, the same in every process.

config --random_source--> Corpus | Examples --> testing/parity.py, through the objective's own samples
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from roots_dist.config.records import corpus_tokens, objective_of, target_seq
from roots_dist.config.schema import Config
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.data.tasks import Example, Examples
from roots_dist.learning.objectives import OBJECTIVES
from roots_dist.world import rng
from roots_dist.world.batch import IGNORE, MicroBatch, Objective

ROWS = 64


def random_source(config: Config) -> Corpus | Examples:
    """Keyed by the config's seed."""
    draw = np.random.default_rng(config.train.seed)
    return (
        Examples("random", tuple(_row(config, draw) for _ in range(ROWS)))
        if objective_of(config).rows
        else _corpus(config, draw)
    )


def _corpus(config: Config, draw: np.random.Generator) -> Corpus:
    """Some 4,000 random tokens of the vocabulary in documents of 2 to 60, or enough for a few samples that are
    longer."""
    documents = max(128, 4 * corpus_tokens(config) // 30)
    lengths = draw.integers(2, 61, size=documents).astype(np.int32)
    stored = draw.integers(config.model.vocab, size=int(lengths.sum()))
    offsets = (np.cumsum(lengths) - lengths) * np.int64(stored.itemsize)
    return Corpus("random", lengths, offsets, np.arange(len(lengths) + 1), stored)


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
        return Example(first, token_labels=(np.arange(len(first)) >= len(first) // 2).astype(np.int32))
    return Example(first, words(1, target_seq(config) + 2))


def proof_objective(config: Config) -> Objective:
    """The config's, without a tokenizer: special tokens are some of the ids."""
    return OBJECTIVES[config.objective.name](config, synthetic_specials(config.model.vocab))


def random_batches(config: Config, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    """This data rank's microbatches of a step, from random documents. The global batch is the same in every layout; one
    target in five is not scored, so that microbatches differ in their counts."""
    batches = Batches(config, proof_objective(config), [random_source(config)], [1.0], dp_rank, dp_size)
    return [_thinned(batch, config.train.seed) for batch in batches.at(step)]


def _thinned(batch: MicroBatch, seed: int) -> MicroBatch:
    if batch.targets is None and batch.labels is not None:  # classes alone: of a text, or of each position
        columns = torch.arange(batch.labels[0].numel(), dtype=torch.int32)
        kept = rng.keep(rng.fold(rng.key("thinned", seed), batch.sample_ids), columns, 0.2).view_as(batch.labels)
        return replace(batch, labels=batch.labels.masked_fill(~kept, IGNORE))
    if batch.targets is None:
        return batch
    columns = torch.arange(batch.targets.shape[1], dtype=torch.int32)
    kept = rng.keep(rng.fold(rng.key("thinned", seed), batch.sample_ids), columns, 0.2)
    return replace(batch, targets=batch.targets.masked_fill(~kept, IGNORE))
