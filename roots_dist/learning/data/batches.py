"""The batch of a step as a function of (seed, step, place): nothing to save, nothing to broadcast.

    step --batch_ramp--> numbers of its samples --order--> (source, index) --objective.sample--> fields --> [MicroBatch]

Every pipeline and tensor rank builds its own copy; data ranks take different samples of the same step. The samples of a
step depend only on seed, step and sources, never on the layout or the microbatch size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from roots_dist.config.batch_ramp import batch_size_at, batch_sizes, samples_before
from roots_dist.config.schema import Config
from roots_dist.config.sections import Source
from roots_dist.errors import ConfigError, DataError, Problem
from roots_dist.learning.data.manifest import read_manifest
from roots_dist.learning.data.order import choose_sources, mix64, permuted, sample_of
from roots_dist.world.batch import IGNORE, MicroBatch, Objective, PackingObjective, stack_samples

TRAINING, HELD_OUT = 4, 5
"""Streams of random keys; order.py uses 0 and 1, and the order of samples below uses 2 and 3."""


ID_FIELDS = ("tokens", "decoder_tokens", "originals", "targets")
"""Fields of a sample that hold token ids."""


class Batches:
    """The microbatches of one data rank, from weighted sources of samples.

    Raises ConfigError if a batch of the run is not a whole number of microbatches, DataError if a source is too short.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        sources: Sequence[Any],
        weights: Sequence[float],
        dp_rank: int = 0,
        dp_size: int = 1,
    ):
        """sources: what objective.open returned for each path."""
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self._config, self._objective, self._rank, self._ranks = config, objective, dp_rank, dp_size
        _check_sizes(config, dp_size)
        self._weights, self._sources = list(weights), list(sources)
        self._num_samples = [objective.num_samples(source) for source in sources]
        # streams 2 and 3 (below) are separate from order.py's 0 and 1
        self._seeds = [int(mix64(mix64(2, config.train.seed), k)) for k in range(len(sources))]

    @staticmethod
    def open(
        config: Config,
        objective: Objective,
        configured: Sequence[Source],
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        packed: bool = False,
    ) -> Batches:
        """Open the sources of training or validation. Raises DataError if one is missing, damaged, or prepared with
        another tokenizer than the first. packed: several rows make a sample (finetune.packing)."""
        _check_tokenizers(configured)
        sources = [open_source(objective, source.path, packed) for source in configured]
        return Batches(config, objective, sources, [source.weight for source in configured], dp_rank, dp_size)

    @property
    def sources(self) -> list[Any]:
        return list(self._sources)

    def with_sources(self, sources: Sequence[Any]) -> Batches:
        """The same samples, from sources that know more of them."""
        return Batches(self._config, self._objective, sources, self._weights, self._rank, self._ranks)

    def of_data_rank(self, dp_rank: int) -> Batches:
        """The microbatches of another data rank."""
        return Batches(self._config, self._objective, self._sources, self._weights, dp_rank, self._ranks)

    @property
    def num_samples(self) -> int:
        """Number of samples in one pass over every source."""
        return sum(self._num_samples)

    @property
    def order_digest(self) -> str:
        """Digest of what decides which samples a step reads: seed, sizes of batches, sources with their weights and
        numbers of samples, length of a sample. The samples' content is not in it."""
        config = self._config
        known = [config.train.seed, batch_sizes(config.train), str(config.train.batch_ramp), self._weights]
        return hashlib.sha256(json.dumps([*known, self._num_samples, config.data.seq_length]).encode()).hexdigest()

    def at(self, step: int, left_out: int = 0) -> list[MicroBatch]:
        """This rank's microbatches of a training step (counted from 0), before which the run has left out that many
        samples."""
        first, size = samples_before(self._config.train, step) + left_out, batch_size_at(self._config.train, step)
        which, nth = choose_sources(first, size, self._weights)
        sample = np.empty(size, dtype=np.int64)
        for k in np.unique(which):
            sample[which == k] = sample_of(nth[which == k], self._num_samples[k], self._seeds[k])
        all_rows = self._rows_of_shards(size)
        return [self._make(first + rows, which[rows], sample[rows], step, TRAINING) for rows in all_rows]

    def evaluation(self, count: int, source: int | None = None) -> Iterator[MicroBatch]:
        """This rank's microbatches of `count` fixed samples of all sources (or of all samples, if there are fewer),
        each exactly once; or only those samples that come from one source.

        Samples are drawn uniformly over all sources, because weights are for training. Every rank gets the same number
        of microbatches; the last ones are filled up with rows without targets.
        """
        count = min(count, self.num_samples)
        which, sample = self._evaluation_order(count)
        numbers = np.arange(count)  # keys of the samples' random draws, whether or not a source is selected
        if source is not None:
            numbers, which, sample = (of_all[which == source] for of_all in (numbers, which, sample))
        multiple = self._config.train.micro_batch * self._ranks
        padded = -(-len(numbers) // multiple) * multiple
        again = np.arange(padded - len(numbers)) % max(1, len(numbers))
        numbers = np.append(numbers, count + np.arange(len(again)))
        which, sample = (np.append(of_all, of_all[again]) for of_all in (which, sample))
        for rows in self._rows(padded):  # one at a time: a held-out corpus may be larger than memory
            batch = self._make(numbers[rows], which[rows], sample[rows], 0, HELD_OUT)
            for field in (batch.targets, batch.labels, batch.originals):
                if field is not None:
                    field[batch.sample_ids >= count] = IGNORE
            yield batch

    def evaluation_samples(self, count: int) -> list[tuple[Any, int]]:
        """The samples of `evaluation` over all ranks: (source, index) of each."""
        which, sample = self._evaluation_order(min(count, self.num_samples))
        return [(self._sources[k], int(i)) for k, i in zip(which, sample)]

    def _evaluation_order(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of the source of each held-out sample, and the sample's index in that source."""
        place = permuted(np.arange(count), self.num_samples, int(mix64(3, self._config.train.seed)))
        borders = np.cumsum(self._num_samples)
        which = np.searchsorted(borders, place, side="right")
        return which, place - (borders - self._num_samples)[which]

    def _rows(self, size: int) -> list[np.ndarray]:
        """Rows of this rank in a batch of `size`, one array per microbatch."""
        micro = self._config.train.micro_batch
        return list(np.arange(size).reshape(-1, self._ranks, micro)[:, self._rank])

    def _rows_of_shards(self, size: int) -> list[np.ndarray]:
        """The same of a training step. In an exact run a rank has the microbatches of its data shards one after
        another, those that each shard would have as a rank."""
        exact = self._config.train.exact
        if exact is None:
            return self._rows(size)
        held = exact.data // self._ranks
        grid = np.arange(size).reshape(-1, exact.data, self._config.train.micro_batch)
        return [rows for shard in range(self._rank * held, (self._rank + 1) * held) for rows in grid[:, shard]]

    def _make(self, numbers: np.ndarray, which: np.ndarray, index: np.ndarray, step: int, stream: int) -> MicroBatch:
        """Build a microbatch. numbers: the numbers of the samples in the run (stream TRAINING) or in the evaluation,
        which key their random draws."""
        keys = mix64(mix64(stream, self._config.train.seed), np.asarray(numbers, dtype=np.int64))
        samples = []
        for k, j, key in zip(which, index, keys):
            fields = self._objective.sample(
                self._sources[k], int(j), np.random.Generator(np.random.Philox(key=int(key)))
            )
            self._check_ids(fields, k, j)
            samples.append(fields)
        return stack_samples(samples, numbers, step)

    def _check_ids(self, fields: dict[str, np.ndarray], source: int, index: int) -> None:
        """Raise DataError if an id is outside the vocabulary: a sharded embedding would return zeros for it."""
        vocab = self._config.model.vocab
        for name in ID_FIELDS:
            if name not in fields:
                continue
            ids = fields[name]
            outside = (ids < 0) & (ids != IGNORE) | (ids >= vocab)
            if outside.any():
                problem = Problem(
                    key=f"token id in sample {index} of {getattr(self._sources[source], 'prefix', 'the data')}",
                    found=int(ids[outside][0]),
                    expected=f"0 or more and below model.vocab = {vocab}",
                    fix="set model.vocab to the size of the corpus's tokenizer",
                )
                raise DataError(problem)


def open_source(objective: Objective, path: str, packed: bool) -> Any:
    """The source; packed if its objective is to learn several rows in a sample."""
    source = objective.open(path)
    if not packed:
        return source
    assert isinstance(objective, PackingObjective), objective
    return objective.packed(source)


def _check_sizes(config: Config, dp: int) -> None:
    multiple = config.train.micro_batch * dp
    wrong = [size for size in batch_sizes(config.train) if size % multiple]
    if wrong:
        key = "train.global_batch" if wrong == [config.train.global_batch] else "train.batch_ramp gives a batch"
        expected = f"a multiple of train.micro_batch × dp = {config.train.micro_batch} × {dp}"
        raise ConfigError(
            [
                Problem(
                    key=key,
                    found=wrong[0],
                    expected=expected,
                    fix="change train.global_batch, batch_ramp or micro_batch",
                )
            ]
        )


def _check_tokenizers(configured: Sequence[Source]) -> None:
    """Raise DataError if two sources are known to be prepared with different tokenizers, which give ids different
    meanings."""
    if not configured:
        raise DataError(
            Problem(
                key="data sources",
                found=[],
                expected="at least one prefix of a .bin/.idx pair",
                fix="name it under data.train or data.validation",
            )
        )
    known = [
        (source.path, manifest.tokenizer_sha256) for source in configured if (manifest := read_manifest(source.path))
    ]
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
