"""Masked tokens in two texts, and: does the second follow the first? (Devlin et al. 2019, section 3.1 and appendix A.2)

    sample number --> a place in the stream --> [CLS] A [SEP] B [SEP], B what follows or a piece of another document

A and B are cut at a sentence's border (a sequence of the .idx: `roots prepare --split-sentences`), else at any token.
B never comes from A's document unless it follows: that would be sentence order, another task.
"""

from __future__ import annotations

import numpy as np

from roots_dist.config.schema import Config
from roots_dist.data.specials import Specials
from roots_dist.data.store import Corpus
from roots_dist.errors import DataError, Problem
from roots_dist.objectives.base import IGNORE, PADDING, MicroBatch, scored
from roots_dist.objectives.mlm import hide

FOLLOWS, RANDOM = 0, 1
SHORTER = 0.1
"""Share of pairs that are made shorter than data.seq, so that the model sees such too (as the original does)."""


class _Pairs:
    """A corpus, and what of it a pair can be made of: documents of two tokens or more, without their end."""

    def __init__(self, corpus: Corpus, specials: Specials):
        self.corpus, self.prefix = corpus, corpus.prefix
        starts = np.append(corpus.starts, corpus.num_tokens)
        self.begins, self.ends = starts[corpus.documents[:-1]], starts[corpus.documents[1:]].copy()
        closed = np.isin(corpus.at(self.ends - 1), [i for i in (specials.end, specials.sep) if i is not None])
        self.ends -= closed & (self.ends > self.begins)
        self.usable = np.flatnonzero(self.ends - self.begins >= 2)

    def sentences(self, document: int) -> np.ndarray:
        """Where each sentence of a document begins, in tokens of the stream."""
        begins = self.corpus.starts[int(self.corpus.documents[document]) : int(self.corpus.documents[document + 1])]
        return begins[begins < self.ends[document]]


class MaskedPairs:
    weights = {"mlm": 1.0, "nsp": 1.0}
    words = "mlm"

    def __init__(self, config: Config, specials: Specials):
        specials.require("cls", "sep", "mask", "pad")
        self.seq, self.how, self.specials = config.data.seq, config.objective, specials
        self.room = config.data.seq - 3

    def open(self, path: str) -> _Pairs:
        return _Pairs(Corpus.open(path), self.specials)

    def num_samples(self, source: _Pairs | Corpus) -> int:
        """As many as the tokens fill."""
        source = self._pairs(source)
        if len(source.usable) < 2:
            problem = Problem(
                key=f"documents in {source.prefix}",
                found=len(source.usable),
                expected="two or more of at least two tokens: half of the second texts come from another document",
                fix="more documents, or objective.name=mlm",
            )
            raise DataError(problem)
        return max(1, source.corpus.num_tokens // self.room)

    def _pairs(self, source: _Pairs | Corpus) -> _Pairs:
        return source if isinstance(source, _Pairs) else _Pairs(source, self.specials)

    def sample(self, source: _Pairs | Corpus, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        source = self._pairs(source)
        room = int(draw.integers(2, self.room + 1)) if draw.random() < SHORTER else self.room
        document, start = self._place(source, index * self.room)
        length = min(room, int(source.ends[document]) - start)
        borders = source.sentences(document) - start
        borders = borders[(borders > 0) & (borders < length)]
        cut = int(draw.choice(borders)) if len(borders) else int(draw.integers(1, length))
        first, second = source.corpus.tokens(start, cut), source.corpus.tokens(start + cut, length - cut)
        label = RANDOM if draw.random() < 0.5 else FOLLOWS
        if label == RANDOM:
            second = self._elsewhere(source, document, room - cut, draw)
        return self._fields(first, second, label, draw)

    def _place(self, source: _Pairs, position: int) -> tuple[int, int]:
        """The document and the token where a pair begins: the first sentence at or behind this place of the stream that
        has something behind it in its document."""
        at = int(np.searchsorted(source.usable, source.corpus.document_at(position))) % len(source.usable)
        document = int(source.usable[at])
        begin, end = int(source.begins[document]), int(source.ends[document])
        position = min(max(position, begin), end - 2)
        sentences = source.sentences(document)
        if len(sentences) < 2:
            return document, position
        return document, int(sentences[min(int(np.searchsorted(sentences, position)), len(sentences) - 2)])

    def _elsewhere(self, source: _Pairs, document: int, most: int, draw: np.random.Generator) -> np.ndarray:
        others = source.usable[source.usable != document]
        other = int(draw.choice(others))
        start = int(draw.choice(source.sentences(other)))
        return source.corpus.tokens(start, min(most, int(source.ends[other]) - start))

    def _fields(self, first: np.ndarray, second: np.ndarray, label: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        s = self.specials
        tokens = np.concatenate([[s.cls], first, [s.sep], second, [s.sep]]).astype(np.int64)
        shown, targets = hide(tokens, s, self.how, draw)
        missing = self.seq - len(tokens)
        segments = np.repeat([0, 1, 0], [len(first) + 2, len(second) + 1, missing])
        return {
            "tokens": np.pad(shown, (0, missing), constant_values=s.pad),
            "targets": np.pad(targets, (0, missing), constant_values=IGNORE),
            "segments": segments,
            "documents": np.where(np.arange(self.seq) < len(tokens), 0, PADDING),
            "labels": np.array(label),
        }

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"mlm": scored(batch.targets), "nsp": scored(batch.labels)}
