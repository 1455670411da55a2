"""Map one text to another: translate, summarise, answer, or spell out a class (Raffel et al. 2020, section 2.4).

    row: text, label --> encoder: text </s>, decoder: (start) label --> label </s>

Both are cut at their ends, to data.seq_length and data.target_seq_length; the token that ends them stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import special_tokens_of, target_seq
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.tasks import Example, Examples, open_examples
from roots_dist.learning.objectives.spans import padded_pair
from roots_dist.world.batch import IGNORE, MicroBatch, QuestionObjective, num_scored


class TextToText(QuestionObjective):
    """S positions of the encoder, T of the decoder."""

    perplexity_term = "seq2seq"
    weights: Mapping[str, float] = {perplexity_term: 1.0}

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.config, self.specials, self.seq, self.target = config, specials, config.data.seq_length, target_seq(config)

    def open(self, path: str) -> Examples:
        return open_examples(path, self.config)

    def num_samples(self, source: Examples) -> int:
        return len(source)

    def too_long(self, example: Example) -> bool:
        return len(example.first) >= self.seq or len(present(example.second)) >= self.target

    def sample(self, source: Examples, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        inputs, targets = self.question(source, index)
        targets = np.pad(targets, (0, self.target - len(targets)), constant_values=IGNORE)
        fields = padded_pair(inputs, targets, self.seq, present(self.specials.pad))
        return {"document_ids": np.zeros(self.seq, np.int64)} | fields

    def question(self, source: Examples, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The input of the encoder, and the answer with the token that ends it."""
        example, end = source.rows[index], [present(self.specials.end)]
        inputs = np.concatenate([example.first[: self.seq - 1], end]).astype(np.int64)
        return inputs, np.concatenate([present(example.second)[: self.target - 1], end]).astype(np.int64)

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {self.perplexity_term: num_scored(batch.targets)}
