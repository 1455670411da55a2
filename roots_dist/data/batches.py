"""The batch of a step, as a function of (seed, step, place): nothing to save, nothing to broadcast.

    step --ramp--> numbers of its samples --order--> (source, sample) --store--> tokens --objective--> [MicroBatch]

Every pipeline and tensor rank makes its own copy; data ranks take different samples of the same step. Which samples a
step holds depends on seed, step and sources alone, never on the layout or the microbatch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from roots_dist.config.schema import Config, Source
from roots_dist.data.manifest import read_manifest
from roots_dist.data.order import mix64, permuted, sample_of, sources
from roots_dist.data.ramp import batch_size_at, batch_sizes, samples_before
from roots_dist.data.store import Corpus
from roots_dist.errors import ConfigError, DataError, Problem
from roots_dist.objectives import OBJECTIVES
from roots_dist.objectives.base import IGNORE, MicroBatch


class Batches:
    """The microbatches of one data rank, from the sources of training or of validation.

    Raises ConfigError if a batch of the run is not whole microbatches, DataError if a source is missing, damaged, too
    short, or made with another tokenizer than the first.
    """

    def __init__(self, config: Config, given: Sequence[Source], dp_rank: int = 0, dp_size: int = 1):
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self._config, self._rank, self._ranks = config, dp_rank, dp_size
        self._objective = OBJECTIVES[config.objective.name]
        self._window = self._objective.window(config.data.seq)
        _check_sizes(config, dp_size)
        _check_tokenizers(given)
        self._weights = [source.weight for source in given]
        self._corpora = [Corpus.open(source.path) for source in given]
        self._num_samples = [self._samples_in(corpus) for corpus in self._corpora]
        # 2 and below 3 are streams of their own: order.py has 0 and 1.
        self._seeds = [int(mix64(mix64(2, config.train.seed), k)) for k in range(len(given))]

    @property
    def num_samples(self) -> int:
        """Of one pass over every source."""
        return sum(self._num_samples)

    def at(self, step: int) -> list[MicroBatch]:
        """This rank's part of a training step (counted from 0)."""
        first, size = samples_before(self._config.train, step), batch_size_at(self._config.train, step)
        which, nth = sources(first, size, self._weights)
        sample = np.empty(size, dtype=np.int64)
        for k in np.unique(which):
            sample[which == k] = sample_of(nth[which == k], self._num_samples[k], self._seeds[k])
        return [self._make(first + rows, which[rows], sample[rows], step) for rows in self._rows(size)]

    def evaluation(self, count: int) -> Iterator[MicroBatch]:
        """This rank's part of `count` fixed samples of all sources together (or of all there are), each exactly once.

        Drawn evenly from everything: weights are for training. Ranks get equal numbers of microbatches; where samples
        run out, rows without a target fill up.
        """
        total = self.num_samples
        count = min(count, total)
        multiple = self._config.train.micro_batch * self._ranks
        padded = -(-count // multiple) * multiple
        place = permuted(np.arange(padded) % count, total, int(mix64(3, self._config.train.seed)))
        borders = np.cumsum(self._num_samples)
        which = np.searchsorted(borders, place, side="right")
        sample = place - (borders - self._num_samples)[which]
        for rows in self._rows(padded):  # one at a time: a held-out corpus may be larger than memory
            batch = self._make(rows, which[rows], sample[rows], step=0)
            batch.targets[batch.samples >= count] = IGNORE
            yield batch

    def _rows(self, size: int) -> list[np.ndarray]:
        """This rank's places in a batch of `size`, one array per microbatch."""
        micro = self._config.train.micro_batch
        return list(np.arange(size).reshape(-1, self._ranks, micro)[:, self._rank])

    def _make(self, numbers: np.ndarray, which: np.ndarray, sample: np.ndarray, step: int) -> MicroBatch:
        stored = np.stack([self._read(k, j) for k, j in zip(which, sample)])
        samples = torch.from_numpy(np.asarray(numbers, dtype=np.int64).copy())
        tokens, targets = self._objective.arrays(torch.from_numpy(stored), samples, self._config.train.seed)
        return MicroBatch(tokens, targets, samples, step)

    def _read(self, source: int, sample: int) -> np.ndarray:
        """int64 ids of one sample, all inside the vocabulary: a sharded embedding would take any other for zeros."""
        corpus, start = self._corpora[source], int(sample) * self._window.stride
        ids = corpus.tokens(start, self._window.length).astype(np.int64)
        vocab = self._config.model.vocab
        outside = np.flatnonzero((ids < 0) | (ids >= vocab))
        if len(outside):
            document = corpus.document_at(start + int(outside[0]))
            raise DataError(
                Problem(
                    key=f"token id in {corpus.prefix}, document {document}",
                    found=int(ids[outside[0]]),
                    expected=f"0 or more and below model.vocab = {vocab}",
                    fix="set model.vocab to the size of the corpus's tokenizer",
                )
            )
        return ids

    def _samples_in(self, corpus: Corpus) -> int:
        samples = (corpus.num_tokens - self._window.length) // self._window.stride + 1
        if samples < 1:
            raise DataError(
                Problem(
                    key=f"tokens in {corpus.prefix}",
                    found=corpus.num_tokens,
                    expected=f"at least {self._window.length}, one sample of data.seq = {self._config.data.seq}",
                    fix="a smaller data.seq, or more text",
                )
            )
        return samples


def _check_sizes(config: Config, dp: int) -> None:
    multiple = config.train.micro_batch * dp
    wrong = [size for size in batch_sizes(config.train) if size % multiple]
    if wrong:
        key = "train.batch" if wrong == [config.train.batch] else "train.batch_ramp gives a batch"
        expected = f"a multiple of train.micro_batch × dp = {config.train.micro_batch} × {dp}"
        raise ConfigError(
            [Problem(key=key, found=wrong[0], expected=expected, fix="change train.batch, batch_ramp or micro_batch")]
        )


def _check_tokenizers(given: Sequence[Source]) -> None:
    """Where both are known, two sources must have been made with one tokenizer: else ids mean different words."""
    if not given:
        raise DataError(
            Problem(
                key="data sources",
                found=[],
                expected="at least one prefix of a .bin/.idx pair",
                fix="name it under data.train or data.validation",
            )
        )
    known = [(source.path, manifest.tokenizer_sha256) for source in given if (manifest := read_manifest(source.path))]
    for path, digest in known[1:]:
        if digest != known[0][1]:
            raise DataError(
                Problem(
                    key="data source",
                    found=path,
                    expected=f"the tokenizer of {known[0][0]!r}, but it was made with another",
                    fix="prepare it with the tokenizer.json of the first",
                )
            )
