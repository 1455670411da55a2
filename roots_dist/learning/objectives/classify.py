"""A class for each text, or for each pair of texts (Devlin et al. 2019, section 4.1; a decoder: Radford et al. 2018,
3.2).

    row: text, (pair,) label --> bert, electra  [CLS] text [SEP] (pair [SEP])
                             --> gpt            text (end pair), read at its last token

What is longer than data.seq_length is cut at its end, of a pair the longer text first, as transformers' examples do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from roots_dist.config.records import family_of, special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.tasks import Example, Examples, open_examples
from roots_dist.world.batch import PADDING, MicroBatch, RowObjective, num_scored


def longest_first(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut two texts at their ends to `room` ids together: the longer one until they are equal, then both."""
    half = room // 2
    if len(first) + len(second) <= room:
        return first, second
    if len(first) <= room - half:
        return first, second[: room - len(first)]
    if len(second) <= half:
        return first[: room - len(second)], second
    return first[: room - half], second[:half]


def padded(tokens: np.ndarray, seq: int, pad: int | None) -> dict[str, np.ndarray]:
    """Fields of a text that may be shorter than the sample. A decoder's tokenizer may have no padding: nobody sees
    it."""
    return {
        "tokens": np.pad(tokens.astype(np.int64), (0, seq - len(tokens)), constant_values=pad or 0),
        "document_ids": np.where(np.arange(seq) < len(tokens), 0, PADDING),
    }


class TextClasses(RowObjective):
    """S positions."""

    weights: Mapping[str, float] = {"classify": 1.0}
    perplexity_term = None

    def __init__(self, config: Config, specials: Specials):
        self.config, self.specials, self.seq = config, specials, config.data.seq_length
        self.enclosed, self.segments = bool(family_of(config).encloses_with), config.model.segments
        specials.require(*special_tokens_of(config))

    def open(self, path: str) -> Examples:
        return open_examples(path, self.config)

    def num_samples(self, source: Examples) -> int:
        return len(source)

    def too_long(self, example: Example) -> bool:
        texts = [text for text in (example.first, example.second) if text is not None]
        return sum(map(len, texts)) > self._room(len(texts))

    def _room(self, texts: int) -> int:
        return self.seq - (texts + 1 if self.enclosed else texts - 1)

    def sample(self, source: Examples, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        example, s = source.rows[index], self.specials
        pair = example.second is not None
        other = np.zeros(0, np.int32) if example.second is None else example.second
        first, second = longest_first(example.first, other, self._room(1 + pair))
        parts: list[ArrayLike]
        if self.enclosed:
            sep = [present(s.sep)]
            parts = [[present(s.cls)], first, sep]
            parts += [second, sep] if pair else []
        else:
            parts = [first, [present(s.end)], second] if pair else [first]
        tokens = np.concatenate(parts)
        fields = padded(tokens, self.seq, s.pad) | {"labels": np.array(example.label)}
        if self.segments:
            fields["segment_ids"] = np.repeat(
                [0, 1, 0], [len(first) + 2, len(tokens) - len(first) - 2, self.seq - len(tokens)]
            )
        return fields

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"classify": num_scored(batch.labels)}
