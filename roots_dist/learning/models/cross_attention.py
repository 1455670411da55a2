"""Attention of a decoder to what an encoder has made of its text (attention.py), in an encoder-decoder.

B sequences, D model width; s positions of the encoder and t of the decoder that this rank has.
"""

from __future__ import annotations

from torch import Tensor

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.attention import Attention
from roots_dist.learning.models.init_stds import InitStds
from roots_dist.learning.models.tiles import Pattern
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.linear import column_parallel
from roots_dist.world.batch import MicroBatch


class CrossAttention(Attention):
    """Attention of the decoder to the encoder's output, without positions and causal mask. Keys and values are computed
    once."""

    def __init__(self, config: Config, tp: TensorParallel, name: str, init_stds: InitStds):
        super().__init__(config, tp, name, None, init_stds, causal=False)

    def forward(self, x: Tensor, batch: MicroBatch, encoded: Tensor | None = None) -> Tensor:
        """[B, t, D], encoded [B, s, D] -> [B, t, D]. `encoded` is not needed if the cache already has its keys and
        values."""
        (q,) = map(self._heads, column_parallel(self.tp, x, [self.query]))
        pair = batch.cache.get(self.name) if batch.cache else None
        if pair is None:
            k, v = map(self._heads, column_parallel(self.tp, present(encoded), [self.key, self.value]))
            pair = (k, v)
            if batch.cache is not None:
                batch.cache.put(self.name, *pair)
        out: Tensor = self.out(self._attend(q, *pair, self.tp.in_region(q.shape[2]), batch))
        return out

    def _masked(self, queries: range, keys: range, batch: MicroBatch) -> Tensor | None:
        """Mask of the encoder's padding."""
        return None if batch.document_ids is None else (batch.document_ids < 0)[:, None, None, :]

    def _pattern(self, queries: range, keys: range, batch: MicroBatch) -> Pattern | None:
        """None: the mask of the encoder's padding has no queries."""
        return None
