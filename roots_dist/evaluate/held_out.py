"""Held-out loss, perplexity and bits per byte of a model, in whatever layout it is.

    Batches.evaluation --Passes.forward--> terms --summed over the world--> Score
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from roots_dist.config.schema import Source
from roots_dist.data.manifest import read_manifest
from roots_dist.objectives.base import MicroBatch, Objective
from roots_dist.train.build import Passes

AT_A_TIME = 16
"""Microbatches per pipeline rank that run in one go: any corpus is scored in the memory of these, and the pipeline
stands still for less than a sixteenth of the time."""


class Sums(NamedTuple):
    """Of one term, over all that was scored."""

    loss: float
    """nats"""
    count: int
    hits: int
    """targets that were the model's best guess"""

    @property
    def mean(self) -> float:
        return self.loss / max(1, self.count)

    @property
    def accuracy(self) -> float:
        return self.hits / max(1, self.count)


@dataclass(frozen=True)
class Score:
    terms: Mapping[str, Sums]
    weights: Mapping[str, float]
    words: str | None
    """The term that has a perplexity."""
    bytes_per_token: float | None
    """of the held-out text; None where no manifest tells, or where not every token is predicted from those before it"""

    @property
    def loss(self) -> float:
        return sum(self.weights[name] * sums.mean for name, sums in self.terms.items())

    @property
    def targets(self) -> int:
        """Of the term of words, or of the first."""
        return self.terms[self.words or next(iter(self.terms))].count

    @property
    def log_likelihood(self) -> float | None:
        """nats, of all predicted words together"""
        return -self.terms[self.words].loss if self.words else None

    @property
    def perplexity(self) -> float | None:
        return math.exp(min(self.terms[self.words].mean, 700.0)) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, unlike the other two."""
        if self.bytes_per_token is None or not self.words:
            return None
        return self.terms[self.words].mean / math.log(2) / self.bytes_per_token

    def metrics(self) -> dict[str, float]:
        """By the names under which they are logged. One term's loss is the loss."""
        found = {"loss/validation": self.loss}
        found |= {f"accuracy/validation/{name}": sums.accuracy for name, sums in self.terms.items()}
        if len(self.terms) > 1:
            found |= {f"loss/validation/{name}": sums.mean for name, sums in self.terms.items()}
        if self.perplexity is not None:
            found["perplexity/validation"] = self.perplexity
        return found if self.bits_per_byte is None else found | {"bits_per_byte/validation": self.bits_per_byte}


def bytes_per_token(given: Sequence[Source]) -> float | None:
    """Of all sources together, from the manifests that `roots prepare` wrote; None if one has none."""
    tokens = bytes_ = 0
    for source in given:
        manifest = read_manifest(source.path)
        split = manifest.split_of(source.path) if manifest else None
        if split is None:
            return None
        tokens, bytes_ = tokens + split.tokens, bytes_ + split.bytes
    return bytes_ / tokens if tokens else None


def score(
    passes: Passes, objective: Objective, batches: Iterable[MicroBatch], bytes_per_token: float | None
) -> Score:
    """batches: this data rank's part. Equal on every rank. Collective over the world.

    No smoothing and no auxiliary loss: the plain mean of -log p.
    """
    mesh, names = passes.mesh, list(objective.weights)
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=mesh.device)
    left = iter(batches)
    while some := [batch.to(mesh.device) for batch in islice(left, AT_A_TIME * mesh.pp.size)]:
        for term in passes.forward(some):
            hits = torch.zeros_like(term.count) if term.hits is None else term.hits
            sums[names.index(term.name)] += torch.stack([term.sum.double(), term.count.double(), hits.double()])
    if mesh.tp.rank > 0:
        sums.zero_()  # terms are the same on each tensor rank: one of them speaks
    rows = mesh.world.sum_(sums).tolist()
    terms = {name: Sums(loss, int(count), int(hits)) for name, (loss, count, hits) in zip(names, rows)}
    causal = list(names) == ["clm"]
    return Score(terms, objective.weights, objective.words, bytes_per_token if causal else None)
