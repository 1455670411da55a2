"""Token embedding with its rows sharded over tensor ranks: each rank looks up its own tokens, zeros elsewhere, then a
sum.

B sequences, S positions, D width, V vocabulary (padded); v = V/tp, s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.parallel.tensor.collectives import TensorParallel, reduce_from_tp_region
from roots_dist.parallel.tensor.exact import context_parts, join_contexts, recorded
from roots_dist.world.sharding import ShardSpec, declare


class VocabParallelEmbedding(nn.Module):
    """Embedding that is sharded along the vocabulary. Ids must be in the vocabulary: learning/data/batches.py rejects
    others, which would become zeros here."""

    def __init__(
        self,
        tp: TensorParallel,
        padded_vocab: int,
        width: int,
        *,
        std: float,
        copy_of: str | None = None,
        shared: nn.Parameter | None = None,
    ):
        """shared: the same weight, if another module of this rank has already declared it."""
        super().__init__()
        self.tp = tp
        if shared is not None:
            self.weight = shared
            return
        spec = ShardSpec(shape=(padded_vocab, width), shard_dim=0, std=std, copy_of=copy_of)
        self.weight = declare(self, "weight", spec, tp.axis)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, s, D]"""
        if self.tp.size == 1:
            return self._looked_up(tokens)
        here = self.weight.shape[0]
        local = tokens - self.tp.rank * here
        elsewhere = (local < 0) | (local >= here)
        words = self._looked_up(local.masked_fill(elsewhere, 0))  # [B, S, D]
        return reduce_from_tp_region(words.masked_fill(elsewhere.unsqueeze(-1), 0), self.tp)

    def _looked_up(self, rows: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, D]: rows of this rank's part."""
        tables = (recorded(self.tp, self.weight, context=number) for number in range(self.tp.contexts))
        return join_contexts(list(map(F.embedding, context_parts(self.tp, rows), tables)))
