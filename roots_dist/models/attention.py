"""Causal self-attention, heads cut over tensor ranks by whole query groups.

B sequences, S positions, D model width, H query heads, G key/value heads, K head width; h = H/tp, g = G/tp (at least 1:
with fewer key/value heads than ranks, neighbouring ranks hold the same one), s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roots_dist import rng
from roots_dist.config.schema import Config
from roots_dist.models.norms import mask_rows
from roots_dist.models.positions import Alibi, Rotary
from roots_dist.objectives.base import MicroBatch
from roots_dist.tensor.collectives import Split
from roots_dist.tensor.linear import ColumnLinear, RowLinear, columns


class Cache:
    """Keys and values of the tokens so far, for generation: one pair per block, and how many tokens they cover."""

    def __init__(self) -> None:
        self.length = 0
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, g, S, K] to the block's pair; return the whole."""
        if name in self._pairs:
            k, v = (torch.cat(pair, 2) for pair in zip(self._pairs[name], (k, v)))
        self._pairs[name] = (k, v)
        return k, v


class Attention(nn.Module):
    def __init__(self, config: Config, split: Split, name: str, positions: Rotary | Alibi | None, std_out: float):
        super().__init__()
        m = config.model
        self.name, self.split, self.positions = name, split, positions
        self.head_dim = m.width_of_head()
        self.drop, self.seed = m.attention_dropout, config.train.seed
        self.recompute = config.train.recompute == "selective"
        kv_parts = min(split.tp.size, m.num_kv_heads())
        self.first_head = split.tp.rank * (m.heads // split.tp.size)

        def project(heads: int, parts: int) -> ColumnLinear:
            return ColumnLinear(split, m.hidden, heads * self.head_dim, bias=m.bias, std=m.std(), parts=parts)

        self.query = project(m.heads, split.tp.size)
        self.key = project(m.num_kv_heads(), kv_parts)
        self.value = project(m.num_kv_heads(), kv_parts)
        self.out = RowLinear(split, m.heads * self.head_dim, m.hidden, bias=m.bias, std=std_out)

    def forward(self, x: Tensor, batch: MicroBatch, cache: Cache | None = None) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for t in columns(self.split, x, [self.query, self.key, self.value])
        )  # [B, h, S, K], twice [B, g, S, K]
        start = cache.length if cache else 0
        queries = range(start, start + q.shape[2])
        if isinstance(self.positions, Rotary):
            q, k = self.positions(q, queries), self.positions(k, queries)
        if cache is not None:
            k, v = cache.extend(self.name, k, v)
        core = self._dropped_core if self.training and self.drop else self._core
        if self.recompute and self.training:
            y = checkpoint(core, q, k, v, queries, batch, use_reentrant=False, preserve_rng_state=False)
        else:
            y = core(q, k, v, queries, batch)
        return self.out(y.transpose(1, 2).flatten(2))

    def _bias(self, queries: range, num_keys: int, like: Tensor) -> Tensor | None:
        """What is added to the scores, with the causal mask in it; None: just causal, from the first position on."""
        if isinstance(self.positions, Alibi):
            return self.positions.bias(queries, num_keys, like)
        if queries.start == 0:
            return None
        place = torch.arange(queries.start, queries.stop, device=like.device).unsqueeze(1)
        after = torch.arange(num_keys, device=like.device) > place
        return like.new_zeros(len(queries), num_keys).masked_fill(after, -torch.inf)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        bias = self._bias(queries, k.shape[2], q)
        if bias is not None and bias.dim() == 3:
            bias = bias.unsqueeze(0)  # [1, h, Q, S]: the fused CPU kernel wants four dimensions
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped)

    def _dropped_core(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        """The same with dropout on the probabilities: written out, because the fused kernels draw their own masks,
        which depend on the layout."""
        h, seq = q.shape[1], k.shape[2]
        k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # [B, h, Q, S]
        bias = self._bias(queries, seq, q)
        if bias is None:
            bias = scores.new_full((len(queries), seq), -torch.inf).triu(1)
        p = (scores + bias).softmax(-1)
        rows = mask_rows(self.seed, f"{self.name}.attention", batch, queries, q.device)  # [B, Q]
        heads = torch.arange(self.first_head, self.first_head + h, device=q.device)
        rows = rng.fold(rows.unsqueeze(1), heads.unsqueeze(1))  # [B, h, Q]
        return rng.dropout(p, self.drop, rows) @ v
