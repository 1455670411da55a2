"""From the logits of the next word to the word: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. Top-k keeps the k likeliest words; top-p (Holtzman et al. 2020) the fewest that together
    have probability p; both together keep what both keep."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """float [B, V] -> int64 [B]. The generator is on the CPU, so that every device draws the same."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float().cpu()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0: no temperature makes it overflow
        if self.top_k is not None:
            worst = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < worst, -torch.inf)
        if self.top_p is not None:
            p, order = logits.softmax(-1).sort(-1, descending=True)
            before = p.cumsum(-1) - p  # a word stays if those before it have not yet reached top_p: the first always
            logits = logits.masked_fill((before >= self.top_p).scatter(-1, order, before >= self.top_p), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
