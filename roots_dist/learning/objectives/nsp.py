"""Masked tokens in two texts, and: does the second follow the first? (Devlin et al. 2019, section 3.1 and appendix A.2)

    sample number --> a sentence in the stream --> A, and B: what follows, or a piece of another document
                  --> [CLS] A [SEP] B [SEP], some of it hidden --> fields

A and B are runs of whole sentences (a sequence of the .idx each: `roots prepare --split-sentences`), cut to fit; in a
document of one sequence, runs of tokens. A random B comes from any other document, never from A's own: that would be
sentence order, another task. It is found by a place drawn from the whole stream, not by drawing a document as the
original does: then a text is B as often where it follows as where it does not, and B alone says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError, Problem, present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.objectives.mlm import hide
from roots_dist.world.batch import IGNORE, PADDING, MicroBatch, num_scored

FOLLOWS, RANDOM = 0, 1
SHORTER = 0.1
"""Share of pairs that are made shorter than data.seq_length, so that the model sees such too (as the original does)."""
SHORTEST = 3
"""Tokens of a document that a pair can be made of: one for each text, and the document's end."""


class _Documents:
    """The documents of a corpus that a pair can be made of, and where their sentences begin."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        bounds = corpus.bounds
        self.usable = np.flatnonzero(np.diff(bounds) >= SHORTEST)

    def at(self, position: int, but: int | None = None) -> int:
        """The usable document that holds this token of the stream, or the next one; not `but`."""
        after = int(np.searchsorted(self.usable, self.corpus.document_at(position)))
        found = int(self.usable[after % len(self.usable)])
        return int(self.usable[(after + 1) % len(self.usable)]) if found == but else found


class MaskedPairs:
    """S positions."""

    weights: Mapping[str, float] = {"mlm": 1.0, "nsp": 1.0}
    perplexity_term = "mlm"

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.seq, self.how, self.specials = config.data.seq_length, config.objective, specials
        self.room = config.data.seq_length - 3
        self._known: dict[Corpus, _Documents] = {}

    def open(self, path: str) -> Corpus:
        return Corpus.open(path)

    def num_samples(self, source: Corpus) -> int:
        """The number of samples that the tokens fill."""
        found = len(self._documents(source).usable)
        if found < 2:
            problem = Problem(
                key=f"documents in {source.prefix}",
                found=found,
                expected=(
                    f"two or more of at least {SHORTEST} tokens: half of the second texts come from another document"
                ),
                fix="more documents, or objective.name=mlm",
            )
            raise DataError(problem)
        return max(1, source.num_tokens // self.room)

    def _documents(self, source: Corpus) -> _Documents:
        if source not in self._known:
            self._known[source] = _Documents(source)
        return self._known[source]

    def sample(self, source: Corpus, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        documents = self._documents(source)
        room = int(draw.integers(2, self.room + 1)) if draw.random() < SHORTER else self.room
        document = documents.at(index * self.room)
        start, ends = self._run(source, document, index * self.room, room, least=2)
        if len(ends) == 1:  # no border between two sentences: between two tokens
            ends = np.arange(start + 1, min(ends[-1], start + room) + 1)
        cut = int(draw.choice(ends[:-1]))
        label = RANDOM if draw.random() < 0.5 else FOLLOWS
        first, second = range(start, cut), range(cut, int(ends[-1]))
        if label == RANDOM:
            position = self._outside(source, document, draw)
            begin, ends = self._run(source, documents.at(position, but=document), position, room - len(first), least=1)
            second = range(begin, int(ends[-1]))
        first, second = fitted(first, second, room, draw)
        texts = [source.tokens(r.start, len(r)) for r in (first, second)]
        return self._fields(texts[0], texts[1], label, draw)

    def _run(self, source: Corpus, document: int, position: int, room: int, least: int) -> tuple[int, np.ndarray]:
        """Whole sentences of a document that fill `room` tokens, or all there are: where the first begins, where each
        ends. The first one begins at or behind `position`, or earlier, so that `least` sentences are left; in a
        document of one sentence it is any token, with `least` tokens left, and room is the end."""
        begins, end = self._sentences(source, document)
        if len(begins) < 2:
            start = min(max(position, int(begins[0])), end - least)
            return start, np.array([min(end, start + room)])
        at = min(int(np.searchsorted(begins, position)), len(begins) - least)
        ends = np.append(begins[at + 1 :], end)
        return int(begins[at]), ends[: int(np.searchsorted(ends, begins[at] + room)) + 1]

    def _sentences(self, source: Corpus, document: int) -> tuple[np.ndarray, int]:
        """The offsets at which the sentences that are not empty begin, and the end of the last one: before the token
        that ends the document."""
        begins = source.sequences_of(document)
        begin, end = (int(bound) for bound in source.bounds[document : document + 2])
        if source.tokens(end - 1, 1)[0] in (self.specials.end, self.specials.sep):
            end -= 1
        begins = np.unique(begins[begins < end])
        return begins if len(begins) else np.array([begin]), end

    def _outside(self, source: Corpus, document: int, draw: np.random.Generator) -> int:
        """Draw a token of the stream that is not in this document."""
        begin, end = (int(bound) for bound in source.bounds[document : document + 2])
        position = int(draw.integers(source.num_tokens - (end - begin)))
        return position if position < begin else position + end - begin

    def _fields(
        self, first: np.ndarray, second: np.ndarray, label: int, draw: np.random.Generator
    ) -> dict[str, np.ndarray]:
        s = self.specials
        tokens = np.concatenate([[s.cls], first, [s.sep], second, [s.sep]]).astype(np.int64)
        shown, targets = hide(tokens, s, self.how, draw)
        missing = self.seq - len(tokens)
        return {
            "tokens": np.pad(shown, (0, missing), constant_values=present(s.pad)),
            "targets": np.pad(targets, (0, missing), constant_values=IGNORE),
            "segment_ids": np.repeat([0, 1, 0], [len(first) + 2, len(second) + 1, missing]),
            "document_ids": np.where(np.arange(self.seq) < len(tokens), 0, PADDING),
            "labels": np.array(label),
        }

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"mlm": num_scored(batch.targets), "nsp": num_scored(batch.labels)}


def fitted(first: range, second: range, room: int, draw: np.random.Generator) -> tuple[range, range]:
    """Cut two texts to `room` tokens together: one token at a time from the longer (the second, if they are equal), at
    its front or its back with equal chance (truncate_seq_pair of the original's create_pretraining_data)."""
    excess = max(0, len(first) + len(second) - room)
    apart = min(excess, abs(len(first) - len(second)))  # the longer one alone, until both are equal; then in turns
    lost = [(excess - apart) // 2, (excess - apart + 1) // 2]
    lost[len(second) > len(first)] += apart
    front = [int(draw.binomial(n, 0.5)) for n in lost]
    first, second = (range(t.start + f, t.stop - n + f) for t, f, n in zip((first, second), front, lost))
    return first, second
