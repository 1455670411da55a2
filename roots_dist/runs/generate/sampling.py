"""Choose the next token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

    logits [B, V] --repetition penalty, temperature, top-k, top-p, min-p--> p [B, V] --a uniform number each--> ids [B]

The random numbers are functions of (seed, prompt, sample, position), so an answer depends neither on the layout nor on
the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roots_dist.errors import present
from roots_dist.world import rng


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; temperature 0 is greedy. Top-k keeps the k likeliest tokens; top-p (Holtzman et al. 2020)
    the fewest whose total probability reaches p; min-p (Nguyen et al. 2024) those with at least this fraction of the
    top probability; together they keep what all keep. repetition_penalty lowers the probability of earlier tokens
    (Keskar et al. 2019, section 4.1)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def choose(self, logits: Tensor, uniform: Tensor | None, before: Sequence[Sequence[int]] = ()) -> Tensor:
        """Choose a token per row: float [B, V] -> int64 [B]. `uniform` is float64 [B] between 0 and 1, None if greedy;
        `before` are the tokens of each row that the penalty counts."""
        logits = penalize(logits, before, self.repetition_penalty) if self.repetition_penalty != 1.0 else logits
        if self.temperature == 0:
            return logits.argmax(-1)
        sums = self.probabilities(logits).cumsum(-1)  # on the CPU in float64: every device chooses the same
        wanted = present(uniform).unsqueeze(-1) * sums[:, -1:]
        return torch.searchsorted(sums, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sampling probabilities: float [B, V] -> float64 [B, V], on the CPU."""
        logits = logits.double().cpu()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0, so no temperature overflows
        if self.top_k is not None:
            worst = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < worst, -torch.inf)
        if self.top_p is not None:
            p, order = logits.softmax(-1).sort(-1, descending=True)
            before = (
                p.cumsum(-1) - p
            )  # a token stays if the likelier ones have not reached top_p; the first always stays
            logits = logits.masked_fill((before >= self.top_p).scatter(-1, order, before >= self.top_p), -torch.inf)
        p = logits.softmax(-1)
        return p if self.min_p is None else p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)


def penalize(logits: Tensor, before: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [B, V] in which tokens of `before` are penalized: positive ones divided by the penalty, negative ones
    multiplied by it."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in zip(seen, before):
        row[list(ids)] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def uniform(seed: int, prompts: Tensor, samples: Tensor, position: int) -> Tensor:
    """Uniform float64 in (0, 1), one for each pair of int64 [B]: index of a prompt, index of one of its samples."""
    rows = rng.fold(rng.fold(rng.key("generate", seed), prompts), samples)
    return (rng.bits(rows, torch.tensor(position)).double() + (2.0**31 + 0.5)) * 2.0**-32
