"""Prefix language modelling: the encoder reads a text's beginning, the decoder goes on (Raffel et al. 2020, 3.2.1,
3.3.1).

window of the corpus --cut at a random place--> inputs   the beginning, filled up to S
                                                targets  the rest, filled up to T
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import special_tokens_of, target_seq
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.store import Corpus, num_windows
from roots_dist.learning.objectives.spans import padded_pair
from roots_dist.world.batch import IGNORE, MicroBatch, num_scored


class Prefix:
    """S positions of the encoder, T of the decoder."""

    perplexity_term = "prefix"  # the term that has a perplexity
    weights: Mapping[str, float] = {perplexity_term: 1.0}  # terms of the loss, and what each is multiplied by

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.seq, self.target_seq, self.pad = config.data.seq_length, target_seq(config), specials.pad

    def open(self, path: str) -> Corpus:
        return Corpus.open(path)

    def num_samples(self, source: Corpus) -> int:
        return num_windows(source, self.seq, self.seq)

    def sample(self, source: Corpus, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        tokens = source.tokens(index * self.seq, self.seq).astype(np.int64)
        cut = int(draw.integers(1, self.seq))
        rest = tokens[cut : cut + self.target_seq]
        targets = np.pad(rest, (0, self.target_seq - len(rest)), constant_values=IGNORE)
        return padded_pair(tokens[:cut], targets, self.seq, present(self.pad))

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {self.perplexity_term: num_scored(batch.targets)}
