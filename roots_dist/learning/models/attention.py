"""Multi-head attention, heads cut over tensor ranks by whole query groups: over the past, over all, over another text.

B sequences, Q query and S key positions, D model width, H query heads, G key/value heads, K head width; h = H/tp, g =
G/tp (at least 1: with fewer key/value heads than ranks, neighbouring ranks hold the same one), s = S/tp under sequence
parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.init_stds import InitStds
from roots_dist.learning.models.norms import mask_rows
from roots_dist.learning.models.positions import Alibi, Relative, Rotary
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch

Positions = Rotary | Alibi | Relative | None


class Attention(nn.Module):
    """name: the global one of this layer, which keys its dropout and its cache. causal: no query sees a later key.
    borders: it stays within batch.documents, which are those of the encoder where there are two stacks."""

    def __init__(
        self,
        config: Config,
        tp: TensorParallel,
        name: str,
        positions: Positions,
        init_stds: InitStds,
        *,
        causal: bool,
        borders: bool = True,
    ):
        super().__init__()
        m = config.model
        self.name, self.tp, self.causal, self.borders = name, tp, causal, borders
        self.positions = None if isinstance(positions, Relative) else positions
        self.relative = positions if isinstance(positions, Relative) else None  # a module: its table is a parameter
        self.head_dim = m.width_of_head()
        self.scale = 1.0 if m.family == "t5" else self.head_dim**-0.5  # T5 has it in its initial weights
        self.drop, self.seed = m.attention_dropout, config.train.seed
        self.recompute = config.train.recompute == "selective"
        kv_parts = min(tp.size, m.num_kv_heads())
        self.first_head = tp.rank * (m.heads // tp.size)

        def project(heads: int, parts: int, std: float) -> ColumnParallelLinear:
            return ColumnParallelLinear(tp, m.hidden, heads * self.head_dim, bias=m.bias, std=std, parts=parts)

        self.query = project(m.heads, tp.size, init_stds.query)
        self.key = project(m.num_kv_heads(), kv_parts, init_stds.key)
        self.value = project(m.num_kv_heads(), kv_parts, init_stds.key)
        self.out = RowParallelLinear(tp, m.heads * self.head_dim, m.hidden, bias=m.bias, std=init_stds.out)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        q, k, v = map(
            self._heads, column_parallel(self.tp, x, [self.query, self.key, self.value])
        )  # [B, h, Q, K], [B, g, Q, K]
        start = batch.cache.length if batch.cache else 0
        queries = range(start, start + q.shape[2])
        if isinstance(self.positions, Rotary):
            q, k = self.positions(q, queries), self.positions(k, queries)
        if batch.cache is not None and self.causal:  # an encoder's are not asked for again
            k, v = batch.cache.extend(self.name, k, v)
        return self._attend(q, k, v, queries, batch)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, h*K] -> [B, h, S, K]"""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        core = self._dropped_core if self.training and self.drop else self._core
        if self.recompute and self.training:
            y = checkpoint(core, q, k, v, queries, batch, use_reentrant=False, preserve_rng_state=False)
        else:
            y = core(q, k, v, queries, batch)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def _hidden(self, queries: range, num_keys: int, batch: MicroBatch) -> Tensor | None:
        """bool [B or 1, 1, Q, S]: which keys a query must not see, other than by the order of time; None: it sees
        all."""
        if batch.documents is None or not self.borders:
            return None
        here = batch.documents[:, queries.start : queries.stop]
        return (here.unsqueeze(2) != batch.documents[:, :num_keys].unsqueeze(1)).unsqueeze(1)

    def _bias(self, queries: range, num_keys: int, batch: MicroBatch, like: Tensor) -> Tensor | None:
        """What is added to the scores, [B or 1, h or 1, Q, S], -inf where nothing is seen. None: nothing, or just that
        no query sees a later key, from the first position on."""
        hidden = self._hidden(queries, num_keys, batch)
        positions = self.relative or self.positions
        bias = (
            None
            if isinstance(positions, Rotary) or positions is None
            else positions.bias(queries, num_keys, like).unsqueeze(0)
        )
        # one new token sees all that is cached, and Alibi has the order of time in its own
        late = self.causal and len(queries) > 1 and not isinstance(positions, Alibi)
        if bias is None and hidden is None and (not late or queries.start == 0):
            return None
        if late:
            place = torch.arange(queries.start, queries.stop, device=like.device).unsqueeze(1)
            after = torch.arange(num_keys, device=like.device) > place  # [Q, S]
            hidden = after if hidden is None else hidden | after
        if bias is None:
            bias = like.new_zeros(1, 1, len(queries), num_keys)
        return bias if hidden is None else bias.masked_fill(hidden, -torch.inf)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        bias = self._bias(queries, k.shape[2], batch, q)
        causal = bias is None and self.causal and len(queries) > 1
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped, scale=self.scale
        )

    def _dropped_core(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        """The same with dropout on the probabilities: written out, because the fused kernels draw their own masks,
        which depend on the layout."""
        h, seq = q.shape[1], k.shape[2]
        k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.scale  # [B, h, Q, S]
        bias = self._bias(queries, seq, batch, q)
        if bias is not None:
            scores = scores + bias
        elif self.causal:
            scores = scores + scores.new_full((len(queries), seq), -torch.inf).triu(1)
        p = scores.softmax(-1)
        rows = mask_rows(self.seed, f"{self.name}.attention", batch, queries, q.device)  # [B, Q]
        heads = torch.arange(self.first_head, self.first_head + h, device=q.device)
        rows = rng.fold(rows.unsqueeze(1), heads.unsqueeze(1))  # [B, h, Q]
        return rng.dropout(p, self.drop, rows) @ v


class CrossAttention(Attention):
    """The decoder's over the encoder's output, without positions and without order. Keys and values are made once."""

    def __init__(self, config: Config, tp: TensorParallel, name: str, init_stds: InitStds):
        super().__init__(config, tp, name, None, init_stds, causal=False)

    def forward(self, x: Tensor, batch: MicroBatch, encoded: Tensor | None = None) -> Tensor:
        """[B, t, D], encoded [B, s, D] -> [B, t, D]. A cache that has read the encoder's output needs it no more."""
        (q,) = map(self._heads, column_parallel(self.tp, x, [self.query]))
        pair = batch.cache.get(self.name) if batch.cache else None
        if pair is None:
            k, v = map(self._heads, column_parallel(self.tp, present(encoded), [self.key, self.value]))
            pair = (k, v)
            if batch.cache is not None:
                batch.cache.put(self.name, *pair)
        return self._attend(q, *pair, range(q.shape[2]), batch)

    def _hidden(self, queries: range, num_keys: int, batch: MicroBatch) -> Tensor | None:
        """The encoder's padding."""
        return None if batch.documents is None else (batch.documents < 0)[:, None, None, :]
