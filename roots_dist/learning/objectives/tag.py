"""A class for each word of a text: names, punctuation, parts of speech (Devlin et al. 2019, section 5.3).

    row: words, a label for each --> tokens (bert, electra: [CLS] tokens [SEP]), the label on its word's first token

What is longer than data.seq_length is cut at its end, words and labels alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import family_of, special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.tasks import Example, Examples, open_examples
from roots_dist.learning.objectives.classify import padded
from roots_dist.world.batch import IGNORE, MicroBatch, RowObjective, num_scored


class WordClasses(RowObjective):
    """S positions."""

    weights: Mapping[str, float] = {"tag": 1.0}
    perplexity_term = None

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.config, self.specials, self.seq = config, specials, config.data.seq_length
        self.enclosed, self.segments = bool(family_of(config).encloses_with), config.model.segments

    def open(self, path: str) -> Examples:
        return open_examples(path, self.config)

    def num_samples(self, source: Examples) -> int:
        return len(source)

    def too_long(self, example: Example) -> bool:
        return len(example.first) > self._room()

    def _room(self) -> int:
        return self.seq - (2 if self.enclosed else 0)

    def sample(self, source: Examples, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        example, s = source.rows[index], self.specials
        tokens, marks = example.first[: self._room()], present(example.token_labels)[: self._room()]
        if self.enclosed:
            tokens, marks = np.concatenate([[s.cls], tokens, [s.sep]]), np.concatenate([[IGNORE], marks, [IGNORE]])
        fields = padded(tokens, self.seq, s.pad)
        fields["labels"] = np.pad(marks.astype(np.int64), (0, self.seq - len(marks)), constant_values=IGNORE)
        return fields | ({"segment_ids": np.zeros(self.seq, np.int64)} if self.segments else {})

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"tag": num_scored(batch.labels)}
