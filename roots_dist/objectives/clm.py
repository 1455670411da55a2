"""Predict the next token: each position's target is the token that follows it in the stream.

    order.py: sample number --batches.py: window of the corpus--> CausalTokens --(tokens, targets)--> MicroBatch

Documents are packed end to end, each closed by its end-of-document token, and attention crosses the borders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roots_dist.objectives.base import IGNORE, MicroBatch, Window


class CausalTokens:
    """B sequences, S positions."""

    @staticmethod
    def window(seq: int) -> Window:
        """One token more than positions: the last target. It is the first token of the next sample."""
        return Window(stride=seq, length=seq + 1)

    @staticmethod
    def arrays(tokens: Tensor, samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """int64 [B, S + 1] -> tokens, targets, each [B, S]. `samples` [B] and `seed` key what an objective draws;
        this one draws nothing."""
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    @staticmethod
    def count(batch: MicroBatch) -> int:
        """Scored targets: what the trainer sums over the step and divides by."""
        return int(torch.count_nonzero(batch.targets != IGNORE))
