"""Held-out loss, perplexity and bits per byte of a model, in whatever layout it is.

    Batches.evaluation --Passes.forward--> terms --summed over the world--> Score
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from roots_dist.config.schema import Source
from roots_dist.data.manifest import read_manifest
from roots_dist.objectives.base import MicroBatch
from roots_dist.train.build import Passes

AT_A_TIME = 16
"""Microbatches per pipeline rank that run in one go: any corpus is scored in the memory of these, and the pipeline
stands still for less than a sixteenth of the time."""


@dataclass(frozen=True)
class Score:
    loss: float
    """nats per target"""
    targets: int
    bytes_per_token: float | None
    """of the held-out text; None where no manifest tells"""

    @property
    def log_likelihood(self) -> float:
        """nats, of all targets together"""
        return -self.loss * self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, unlike the other two."""
        return None if self.bytes_per_token is None else self.loss / math.log(2) / self.bytes_per_token

    def metrics(self) -> dict[str, float]:
        found = {"loss/validation": self.loss, "perplexity/validation": self.perplexity}
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


def score(passes: Passes, batches: Iterable[MicroBatch], bytes_per_token: float | None) -> Score:
    """batches: this data rank's part. Equal on every rank. Collective over the world.

    No smoothing and no auxiliary loss: the plain mean of -log p.
    """
    mesh = passes.mesh
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    left = iter(batches)
    while some := [batch.to(mesh.device) for batch in islice(left, AT_A_TIME * mesh.pp.size)]:
        for term in passes.forward(some):
            sums += torch.stack([term.sum.double(), term.count.double()])
    if mesh.tp.rank > 0:
        sums.zero_()  # terms are the same on each tensor rank: one of them speaks
    total, count = mesh.world.sum_(sums).tolist()
    return Score(total / max(1.0, count), int(count), bytes_per_token)
