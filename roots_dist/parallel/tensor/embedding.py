"""The token embedding, its rows cut over tensor ranks: a word is looked up where it lives, zero elsewhere, and summed.

B sequences, S positions, D width, V words (padded); v = V/tp, s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.parallel.tensor.collectives import TensorParallel, reduce_from_tp_region
from roots_dist.world.sharding import ShardSpec, declare


class VocabParallelEmbedding(nn.Module):
    """Ids must be below the vocabulary's size: learning/data/batches.py refuses others, which would become zeros
    here."""

    def __init__(
        self,
        tp: TensorParallel,
        padded_vocab: int,
        width: int,
        *,
        std: float,
        copy_of: str | None = None,
        there: nn.Parameter | None = None,
    ):
        """there: the same weight, where another module of this rank has declared it."""
        super().__init__()
        self.tp = tp
        if there is not None:
            self.weight = there
            return
        spec = ShardSpec(shape=(padded_vocab, width), cut=0, std=std, copy_of=copy_of)
        self.weight = declare(self, "weight", spec, tp.axis)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, s, D]"""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        here = self.weight.shape[0]
        local = tokens - self.tp.rank * here
        elsewhere = (local < 0) | (local >= here)
        words = F.embedding(local.masked_fill(elsewhere, 0), self.weight)  # [B, S, D]
        return reduce_from_tp_region(words.masked_fill(elsewhere.unsqueeze(-1), 0), self.tp)
