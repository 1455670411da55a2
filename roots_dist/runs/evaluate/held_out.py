"""Held-out loss, perplexity and bits per byte of a model in any layout, and accuracy on tasks.

Batches.evaluation, source by source --Passes.forward--> terms --summed over the world--> Score --combine--> Score
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from roots_dist.assembly.passes import Passes
from roots_dist.config.records import objective_of
from roots_dist.errors import present
from roots_dist.learning.data.batches import Batches
from roots_dist.runs.evaluate import sources
from roots_dist.runs.evaluate.task_metrics import task_metrics
from roots_dist.world.batch import MicroBatch, Objective

AT_A_TIME = 16
"""Number of microbatches per pipeline rank in one forward pass. Memory is bounded by these for any corpus, and the
pipeline is idle for less than a sixteenth of the time."""


class TermSums(NamedTuple):
    """Sums of one term over everything that was scored."""

    loss: float
    """nats"""
    count: int  # type: ignore[assignment] # hides a tuple's method, which nobody calls
    hits: int
    """Number of targets that were the model's best guess."""

    @property
    def mean(self) -> float:
        return self.loss / max(1, self.count)

    @property
    def accuracy(self) -> float:
        return self.hits / max(1, self.count)


@dataclass(frozen=True)
class Score:
    terms: Mapping[str, TermSums]
    weights: Mapping[str, float]
    perplexity_term: str | None
    """Name of the term that has a perplexity."""
    bytes_per_token: float | None
    """Bytes per token of the held-out text; None if no manifest has it."""
    confusion: np.ndarray | None = None
    """int64 [C, C] for tasks with classes: how many targets of each class (rows) were predicted as each (columns)."""
    labels: tuple[str, ...] = ()
    """Names of the classes."""
    sources: Mapping[str, Score] = field(default_factory=dict)
    """Score of each source alone, if there are several."""
    every_token: bool = False
    """True if every token is predicted from those before it."""

    @property
    def loss(self) -> float:
        return sum(self.weights[name] * sums.mean for name, sums in self.terms.items())

    @property
    def targets(self) -> int:
        """Number of targets of the term with a perplexity, or of the first term."""
        return self.terms[self.perplexity_term or next(iter(self.terms))].count

    @property
    def log_likelihood(self) -> float | None:
        """Log-likelihood in nats of all predicted tokens together."""
        return -self.terms[self.perplexity_term].loss if self.perplexity_term else None

    @property
    def perplexity(self) -> float | None:
        return math.exp(min(self.terms[self.perplexity_term].mean, 700.0)) if self.perplexity_term else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte, which unlike loss and perplexity is comparable between tokenizers. None if not every token is
        predicted from those before."""
        if self.bytes_per_token is None or self.perplexity_term is None or not self.every_token:
            return None
        return self.terms[present(self.perplexity_term)].mean / math.log(2) / self.bytes_per_token

    def metrics(self) -> dict[str, float]:
        """Metrics under their names in metrics.jsonl. If there is one term, its loss is the loss."""
        found = {"loss/validation": self.loss}
        found |= {f"accuracy/validation/{name}": sums.accuracy for name, sums in self.terms.items()}
        if len(self.terms) > 1:
            found |= {f"loss/validation/{name}": sums.mean for name, sums in self.terms.items()}
        found |= {f"loss/validation/{name}": one.loss for name, one in self.sources.items() if one.targets}
        if self.confusion is not None:
            found |= task_metrics(self.confusion, self.labels)
        if self.perplexity is not None:
            found["perplexity/validation"] = self.perplexity
        return found if self.bits_per_byte is None else found | {"bits_per_byte/validation": self.bits_per_byte}


ProgressBar = Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]]


def score_held_out(
    passes: Passes,
    objective: Objective,
    held_out: Batches,
    sequences: int,
    bytes_per_token: float | None,
    progress: ProgressBar = iter,
) -> Score:
    """Score `sequences` sequences of data.validation together, and each source alone if there are several. `held_out`
    has this data rank's part; `progress` wraps the batches. Collective over the world; equal on every rank."""
    sources_of_text = passes.config.data.validation
    if len(sources_of_text) == 1:
        return score(passes, objective, progress(held_out.evaluation(sequences)), bytes_per_token)
    found = {
        name: score(passes, objective, progress(held_out.evaluation(sequences, number)), None)
        for number, name in enumerate(sources.names(sources_of_text))
    }
    return combine(found, bytes_per_token)


def combine(scores: Mapping[str, Score], bytes_per_token: float | None) -> Score:
    """Combined score of all sources: every target counts once."""
    one, *_ = every = list(scores.values())
    terms = {name: TermSums(*map(sum, zip(*(score.terms[name] for score in every)))) for name in one.terms}
    tables = [score.confusion for score in every if score.confusion is not None]
    confusion = np.sum(tables, axis=0) if tables else None
    return replace(one, terms=terms, confusion=confusion, bytes_per_token=bytes_per_token, sources=scores)


def score(passes: Passes, objective: Objective, batches: Iterable[MicroBatch], bytes_per_token: float | None) -> Score:
    """Score this data rank's batches. Collective over the world; equal on every rank.

    The loss is the plain mean of -log p, without smoothing or auxiliary losses.
    """
    mesh, names, config = passes.mesh, list(objective.weights), passes.config
    labels = config.finetune.labels if objective_of(config).has_labels else ()
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=mesh.device)
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.int64, device=mesh.device)
    left = iter(batches)
    while some := [batch.to(mesh.device) for batch in islice(left, AT_A_TIME * mesh.pp.size)]:
        for term in passes.forward(some):
            hits = torch.zeros_like(term.count) if term.hits is None else term.hits
            sums[names.index(term.name)] += torch.stack([term.sum.double(), term.count.double(), hits.double()])
            if labels:
                confusion += term.confusion
    if mesh.tp.rank > 0:  # terms are equal on all tensor ranks, so only one adds them
        sums.zero_()
        confusion.zero_()
    rows = mesh.world.sum_(sums).tolist()
    terms = {name: TermSums(loss, int(count), int(hits)) for name, (loss, count, hits) in zip(names, rows)}
    counted = mesh.world.sum_(confusion).cpu().numpy() if labels else None
    every_token = objective_of(config).every_token
    return Score(
        terms, objective.weights, objective.perplexity_term, bytes_per_token, counted, labels, every_token=every_token
    )
