"""Span corruption: runs of tokens give way to sentinels, the decoder says what stood there (Raffel et al. 2020, 3.1.4).

    window of the corpus --> inputs  Thank you <0> me to your party <1> week </s>
                             targets <0> for inviting <1> last </s>

How many tokens a sample reads, hides and gives back is fixed by the config (config/span_lengths.py), so
inputs and targets have the same lengths in every sample, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import span_lengths_of, special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError, Problem, present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.store import Corpus, num_windows
from roots_dist.world.batch import PADDING, MicroBatch, num_scored


def segments(items: int, count: int, draw: np.random.Generator) -> np.ndarray:
    """int64 [count]: a random way to cut `items` things into `count` runs of one or more, all ways alike."""
    cuts = 1 + np.sort(draw.permutation(items - 1)[: count - 1])
    return np.diff(np.concatenate([[0], cuts, [items]]))


class Spans:
    """S positions of the encoder, T of the decoder."""

    perplexity_term = "spans"
    weights: Mapping[str, float] = {perplexity_term: 1.0}

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.seq, self.specials, self.lengths = config.data.seq_length, specials, span_lengths_of(config)
        if len(specials.sentinels) < self.lengths.spans:
            problem = Problem(
                key="data.tokenizer",
                found=specials.name,
                expected=f"at least {self.lengths.spans} sentinels (<extra_id_0> …), one for each span of a sample; "
                "it has "
                f"{len(specials.sentinels)}",
                fix="prepare the corpus with --kind unigram, or lower data.seq_length or objective.mask_probability",
            )
            raise DataError(problem)

    def open(self, path: str) -> Corpus:
        return Corpus.open(path)

    def num_samples(self, source: Corpus) -> int:
        return num_windows(source, self.lengths.tokens, self.lengths.tokens)

    def sample(self, source: Corpus, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        _, _, _, hidden, spans = self.lengths
        tokens = source.tokens(index * self.lengths.tokens, self.lengths.tokens).astype(np.int64)
        lengths = np.stack([segments(len(tokens) - hidden, spans, draw), segments(hidden, spans, draw)], 1)
        runs = np.split(tokens, np.cumsum(lengths.ravel())[:-1])  # seen, hidden, seen, hidden …
        s = self.specials
        inputs = [part for k in range(spans) for part in (runs[2 * k], [s.sentinels[k]])]
        targets = [part for k in range(spans) for part in ([s.sentinels[k]], runs[2 * k + 1])]
        read, said = (np.concatenate([*parts, [present(s.end)]]) for parts in (inputs, targets))
        return padded_pair(read, said, self.seq, present(s.pad))

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {self.perplexity_term: num_scored(batch.targets)}


def padded_pair(inputs: np.ndarray, targets: np.ndarray, seq: int, pad: int) -> dict[str, np.ndarray]:
    """Fields of two stacks: the encoder reads `inputs`, filled up to seq; the decoder reads the targets one place
    later, after the padding token (T5's start)."""
    fields = {
        "tokens": np.pad(inputs, (0, seq - len(inputs)), constant_values=pad),
        "targets": targets,
        "decoder_tokens": np.concatenate([[pad], np.where(targets < 0, pad, targets)[:-1]]),
    }
    if len(inputs) < seq:
        fields["document_ids"] = np.where(np.arange(seq) < len(inputs), 0, PADDING)
    return fields
