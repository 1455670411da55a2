"""From the logits of the next word to the word: greedy, temperature, top-k, top-p, min-p, a penalty on repetition.

    logits [B, V] --penalty--> --temperature, top-k, top-p, min-p--> p [B, V] --one uniform number each--> ids [B]

The numbers are functions of (seed, prompt, sample, position): what a prompt is answered with depends neither on the
layout nor on what else is in its batch.
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
    """temperature 0 is greedy. Top-k keeps the k likeliest words; top-p (Holtzman et al. 2020) the fewest that together
    have probability p; min-p (Nguyen et al. 2024) those that have at least this share of the likeliest one's; together
    they keep what all keep. Probabilities of words that were there already are lowered by repetition_penalty (Keskar et
    al. 2019, section 4.1)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def choose(self, logits: Tensor, uniform: Tensor | None, before: Sequence[Sequence[int]] = ()) -> Tensor:
        """float [B, V] -> int64 [B]. uniform: float64 [B] between 0 and 1; None if greedy. before: of each row the
        words that the penalty is for."""
        logits = penalize(logits, before, self.repetition_penalty) if self.repetition_penalty != 1.0 else logits
        if self.temperature == 0:
            return logits.argmax(-1)
        sums = self.probabilities(logits).cumsum(-1)  # on the CPU in float64: every device chooses the same
        wanted = present(uniform).unsqueeze(-1) * sums[:, -1:]
        return torch.searchsorted(sums, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """float [B, V] -> float64 [B, V] on the CPU: what words are drawn with."""
        logits = logits.double().cpu()
        logits = (
            logits - logits.amax(-1, keepdim=True)
        ) / self.temperature  # at most 0: no temperature makes it overflow
        if self.top_k is not None:
            worst = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < worst, -torch.inf)
        if self.top_p is not None:
            p, order = logits.softmax(-1).sort(-1, descending=True)
            before = p.cumsum(-1) - p  # a word stays if those before it have not yet reached top_p: the first always
            logits = logits.masked_fill((before >= self.top_p).scatter(-1, order, before >= self.top_p), -torch.inf)
        p = logits.softmax(-1)
        return p if self.min_p is None else p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)


def penalize(logits: Tensor, before: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """float [B, V]: words of `before` have positive logits divided by the penalty, negative ones multiplied with it."""
    there = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in zip(there, before):
        row[list(ids)] = True
    return torch.where(there, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def uniform(seed: int, prompts: Tensor, samples: Tensor, position: int) -> Tensor:
    """float64 in (0, 1), one for each pair of int64 numbers [B]: of a prompt and of one of its samples."""
    rows = rng.fold(rng.fold(rng.key("generate", seed), prompts), samples)
    return (rng.bits(rows, torch.tensor(position)).double() + (2.0**31 + 0.5)) * 2.0**-32
