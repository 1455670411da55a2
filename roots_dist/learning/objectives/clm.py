"""Predict the next token: each position's target is the token that follows it in the stream.

    order.py: sample number --batches.py--> CausalTokens.sample: window of the corpus --> tokens, targets

Documents are packed end to end, each closed by its end-of-document token. Attention crosses the borders (as in BLOOM),
unless objective.reset_at_documents says that it begins anew with each document.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.schema import Config
from roots_dist.learning.data.store import Corpus, num_windows
from roots_dist.world.batch import MicroBatch, num_scored


class CausalTokens:
    """S positions."""

    perplexity_term = "clm"
    weights: Mapping[str, float] = {perplexity_term: 1.0}

    def __init__(self, config: Config, specials: object = None):
        self.seq, self.reset_at_documents = config.data.seq_length, config.objective.reset_at_documents

    def open(self, path: str) -> Corpus:
        return Corpus.open(path)

    def num_samples(self, source: Corpus) -> int:
        return num_windows(source, self.seq, self.seq + 1)

    def sample(self, source: Corpus, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """One token more than positions is read: the last target is the first token of the next sample."""
        stored = source.tokens(index * self.seq, self.seq + 1)
        fields = {"tokens": stored[:-1], "targets": stored[1:]}
        return fields | self._document_fields(source, index * self.seq) if self.reset_at_documents else fields

    def _document_fields(self, source: Corpus, start: int) -> dict[str, np.ndarray]:
        """The document to which each position belongs, and its place in the part of the document that lies in this
        window. A document's last token is followed by another document: that target is still predicted, from the whole
        document."""
        documents = source.documents_of(start, self.seq)
        first = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1))
        places = np.arange(self.seq) - np.repeat(first, np.diff(first, append=self.seq))
        return {"document_ids": documents, "position_ids": places}

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {self.perplexity_term: num_scored(batch.targets)}
