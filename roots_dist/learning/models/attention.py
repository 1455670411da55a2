"""Multi-head attention, with heads sharded over tensor ranks by whole query groups: causal or bidirectional.

B sequences, Q query and S key positions, D model width, H query heads, G key/value heads, K head width; h = H/tp, g =
G/tp (at least 1: with fewer key/value heads than ranks, neighbouring ranks hold the same one), s = S/tp under sequence
parallelism. Under context parallelism a rank has L = S/cp positions in two ranges, and attends from each of them to the
keys of all ranks, or exchanges them for all positions of h/cp heads: masks, biases and dropout are those of global
positions and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roots_dist.config.records import family_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.dropped_attention import dropped_attention
from roots_dist.learning.models.fused_attention import fused_attention
from roots_dist.learning.models.init_stds import InitStds
from roots_dist.learning.models.norms import mask_rows
from roots_dist.learning.models.positions import Alibi, Relative, Window, either
from roots_dist.learning.models.qk_norm import HeadNorm, WholeNorm, norm_together
from roots_dist.learning.models.rotary import Rotary
from roots_dist.learning.models.tiles import Pattern
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.context import Gather, to_heads, to_positions
from roots_dist.parallel.tensor.exact import heads_of_keys, heads_of_shards, join_heads, spread
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear, column_parallel_on
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch
from roots_dist.world.positions import Positions

Encoding = Rotary | Alibi | Relative | None


class Attention(nn.Module):
    """Self-attention.

    name: global name of the layer, the key of its dropout and its cache. causal: no query sees a later key.
    document_mask: attention stays within batch.document_ids, which are those of the encoder in an encoder-decoder.
    window: what a query sees of the keys before it; None: all.
    """

    def __init__(
        self,
        config: Config,
        tp: TensorParallel,
        name: str,
        positions: Encoding,
        init_stds: InitStds,
        *,
        causal: bool,
        document_mask: bool = True,
        window: Window | None = None,
    ):
        super().__init__()
        m = config.model
        self.window, self.softcap = window, m.attention_softcap
        self.name, self.tp, self.causal, self.document_mask = name, tp, causal, document_mask
        self.positions = None if isinstance(positions, Relative) else positions
        self.relative = positions if isinstance(positions, Relative) else None  # a module with a parameter
        self.head_dim = m.width_of_head()
        self.scale = m.usual_attention_scale() if family_of(config).scaled_attention else 1.0
        if m.attention_scale is not None:
            self.scale = m.attention_scale
        self.drop, self.seed = m.attention_dropout, config.train.seed
        self.recompute, self.recompute_all = (config.train.recompute == r for r in ("selective", "full"))
        kv_parts = min(tp.size, m.num_kv_heads())
        self.num_heads = m.heads // tp.size
        self._part = (0, 1)  # the part of the heads on which attention runs now, and of how many
        self._make_projections(config, init_stds)
        self.out = RowParallelLinear(
            tp,
            m.heads * m.width_of_value(),
            m.hidden,
            bias=m.bias_of_out(),
            std=init_stds.out,
            in_sum=m.has_parallel_branches(),
        )
        self.query_norm: HeadNorm | WholeNorm | None = None
        self.key_norm: HeadNorm | WholeNorm | None = None
        if m.qk_norm == "head":
            self.query_norm, self.key_norm = HeadNorm(config, tp), HeadNorm(config, tp)
        elif m.qk_norm == "whole":
            self.query_norm = WholeNorm(config, tp, m.heads, tp.size)
            self.key_norm = WholeNorm(config, tp, m.num_kv_heads(), kv_parts)

    def _make_projections(self, config: Config, init_stds: InitStds) -> None:
        m = config.model

        def project(heads: int, std: float) -> ColumnParallelLinear:
            width = heads * self.head_dim
            return ColumnParallelLinear(self.tp, m.hidden, width, bias=m.bias_of_qkv(), std=std, parts=heads)

        self.query = project(m.heads, init_stds.query)
        self.key = project(m.num_kv_heads(), init_stds.key)
        self.value = project(m.num_kv_heads(), init_stds.key)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        gather = self._new_gather()

        def start(k: Tensor, v: Tensor) -> None:
            gather.start(self._keys_and_values(k, v, self.tp.in_region(k.shape[1])))

        q, k, v = column_parallel_on(
            self.tp, (x,), [(0, p) for p in self.projections()], start if self._gathers_early() else None
        )
        return self._leave(self.mix(q, k, v, batch, gather), gather)

    def _leave(self, mixed: Tensor, gather: Gather) -> Tensor:
        """[B, Q, h*K] -> [B, s, D]"""
        out: Tensor = self.out(mixed)
        if gather.is_asked_again and out.requires_grad:  # behind the backward of the output projection
            out.register_hook(lambda _: gather.start_again())
        return out

    def _new_gather(self) -> Gather:
        is_for_all = self.relative is not None or self.tp.exact is not None  # a bias of all heads; kernels of a shard's
        return Gather(self.tp, at_once=is_for_all)

    def _gathers_early(self) -> bool:
        """True if the keys can be sent to other context ranks before the queries are computed."""
        alone = self.key.lora is None and self.value.lora is None and not isinstance(self.key_norm, WholeNorm)
        return self.tp.cp.size > 1 and not self.tp.exchanges_heads and alone

    def _keys_and_values(self, k: Tensor, v: Tensor, places: Positions) -> Tensor:
        """Twice [B, L, g*K] -> [2, B, g, L, K]: as they are attended to."""
        k, v = self._heads(k), self._heads(v)
        if isinstance(self.key_norm, HeadNorm):
            k = self.key_norm(k)
        return torch.stack([self.positions(k, places) if isinstance(self.positions, Rotary) else k, v])

    def projections(self) -> list[ColumnParallelLinear]:
        return [self.query, self.key, self.value]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, batch: MicroBatch, gather: Gather | None = None) -> Tensor:
        """Projections [B, Q, h*K] and twice [B, Q, g*K] -> values mixed by attention, [B, Q, h*K]. gather: what is
        under way of k and v."""
        if isinstance(self.query_norm, WholeNorm) and isinstance(self.key_norm, WholeNorm):
            q, k = norm_together((self.query_norm, self.key_norm), (q, k))
        q, k, v = map(self._heads, (q, k, v))  # [B, h, Q, K], [B, g, Q, K]
        if isinstance(self.query_norm, HeadNorm) and isinstance(self.key_norm, HeadNorm):
            q, k = self.query_norm(q), self.key_norm(k)
        queries = self.tp.in_region(q.shape[2]).after(batch.cache.length if batch.cache else 0)
        if isinstance(self.positions, Rotary):
            q, k = self.positions(q, queries), self.positions(k, queries)
        if batch.cache is not None and self.causal:  # keys and values of an encoder are not needed again
            k, v = batch.cache.extend(self.name, k, v, keep=None if self.window is None else self.window.size - 1)
        return self._attend(q, k, v, queries, batch, gather)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, h*K] -> [B, h, S, K]"""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    @property
    def first_head(self) -> int:
        """Global number of the first head that this rank attends with."""
        return self.tp.rank * self.num_heads + self.tp.attending(self.num_heads, self._part).start

    @property
    def _drops(self) -> bool:
        return bool(self.training and self.drop)

    @property
    def _is_plain(self) -> bool:
        """True if scores are computed one by one, because no fused kernel supports the layer."""
        return bool(self.softcap)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Positions, batch: MicroBatch, gather: Gather | None = None
    ) -> Tensor:
        """[B, h, Q, K], [B, g, S, K] -> [B, Q, h*K]. Under context parallelism k and v are of this rank's positions."""
        exchanged = self.tp.exchanges_heads
        if exchanged:
            q, (k, v) = to_heads(q, self.tp), to_heads(torch.stack([k, v]), self.tp)
            queries = Positions((range(q.shape[2]),))
        core: Callable[..., Tensor] = self._by_shards if self.tp.shards > 1 and batch.cache is None else self._whole
        if self.tp.context_shards > 1 and not exchanged:
            core = partial(self._from_ranges, gather or self._new_gather())
        if self._is_plain and self.recompute and self.training:  # a fused kernel keeps no scores: it recomputes them
            y = checkpoint(core, q, k, v, queries, batch, use_reentrant=False, preserve_rng_state=False)
        else:
            y = core(q, k, v, queries, batch)
        y = to_positions(y, self.tp) if exchanged else y
        mixed: Tensor = y.transpose(1, 2).flatten(2)
        return mixed

    def _by_shards(self, q: Tensor, k: Tensor, v: Tensor, queries: Positions, batch: MicroBatch) -> Tensor:
        """The same on the heads of one tensor shard after another: a kernel is chosen by their number, too."""
        return self._each_shard(heads_of_shards(self.tp, q, k, v), queries, batch)

    def _each_shard(self, parts: Sequence[tuple[Tensor, ...]], queries: Positions, batch: MicroBatch) -> Tensor:
        """The same for the queries, keys and values of each tensor shard."""
        if len(parts) == 1:
            q, k, v = parts[0]
            return self._whole(q, k, v, queries, batch)
        mixed: list[Tensor] = []
        for number, (q, k, v) in enumerate(parts):
            with self._on_part(number, len(parts)):
                mixed.append(self._whole(q, k, v, queries, batch))
        return join_heads(mixed)

    @contextmanager
    def _on_part(self, number: int, parts: int) -> Iterator[None]:
        """Run attention in the body on one of several equal parts of the heads."""
        before, self._part = self._part, (number, parts)
        try:
            yield
        finally:  # recomputation may leave here
            self._part = before

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, queries: Positions, batch: MicroBatch) -> Tensor:
        """[B, h, Q, K] of queries in one range, and all keys up to the last of them -> [B, h, Q, K]"""
        (only,) = queries.ranges
        if self._is_plain:
            return self._plain_core(q, k, v, only, batch)
        return (self._dropped_core if self._drops else self._core)(q, k, v, only, batch)

    def _from_ranges(
        self, gather: Gather, q: Tensor, k: Tensor, v: Tensor, queries: Positions, batch: MicroBatch
    ) -> Tensor:
        """The same where context shards have two ranges of queries each; k, v [B, g, L, K] of this rank's positions."""

        def attend(number: int, groups: int, q: Tensor, both: Tensor) -> Tensor:
            copies, mixed = [heads_of_keys(self.tp, copy) for copy in spread(both, self.tp.contexts)], list[Tensor]()
            with self._on_part(number, groups):
                for place, (part, r) in enumerate(zip(q.split([len(r) for r in queries.ranges], 2), queries.ranges)):
                    seen = slice(r.stop if self.causal else None)
                    shards = zip(heads_of_shards(self.tp, part), copies[place // 2])
                    heads = [(*of_part, *of_all[:, :, :, seen]) for of_part, of_all in shards]
                    mixed.append(self._each_shard(heads, Positions((r,)), batch))
            return torch.cat(mixed, 2)

        saved = self.recompute_all or (self._is_plain and self.recompute)
        return gather.by_groups(attend, q, torch.stack([k, v]), saved=saved)

    def _masked(self, queries: range, keys: range, batch: MicroBatch) -> Tensor | None:
        """bool [B or 1, 1, Q, S]: keys that a query must not see, apart from the causal mask; None if none."""
        if batch.document_ids is None or not self.document_mask:
            return None
        here, there = (batch.document_ids[:, r.start : r.stop] for r in (queries, keys))
        return (here.unsqueeze(2) != there.unsqueeze(1)).unsqueeze(1)

    def _bias(self, queries: range, keys: range, batch: MicroBatch, like: Tensor) -> Tensor | None:
        """Bias on the scores, [B or 1, h or 1, Q, S], with -inf at masked keys. None if there is none, or if the causal
        mask is all there is."""
        masked = self._masked(queries, keys, batch)
        positions = self.relative or self.positions
        places = range(queries.start - keys.start, queries.stop - keys.start)  # in the keys; a cache has lost the first
        bias = None
        if isinstance(positions, Alibi | Relative):
            bias = self._of_heads(positions.bias(places, len(keys), like))
        # a single new token sees the whole cache, and Alibi's bias includes the causal mask
        late = self.causal and len(queries) > 1 and not isinstance(positions, Alibi)
        if self.window is not None and len(keys) > self.window.size:
            if bias is None and masked is None:
                return self.window.bias(places, len(keys), like)
            masked = either(masked, self.window.masked(places, len(keys), like.device))
        elif bias is None and masked is None:
            return None
        elif late:
            place = torch.arange(places.start, places.stop, device=like.device).unsqueeze(1)
            masked = either(masked, torch.arange(len(keys), device=like.device) > place)  # [Q, S]
        if bias is None:
            bias = like.new_zeros(1, 1, len(queries), len(keys))
        return bias if masked is None else bias.masked_fill(masked, -torch.inf)

    def _of_heads(self, bias: Tensor) -> Tensor:
        """[h, Q, S] of all heads of this tensor rank -> [1, h, Q, S] of those that attention runs on here."""
        mine = self.tp.attending(self.num_heads, self._part)
        return bias[mine.start : mine.stop].unsqueeze(0)

    def _keys(self, queries: range, num_keys: int) -> range:
        """Positions of the keys: the last query sees the last one, unless all see all."""
        return range(queries.stop - num_keys if self.causal else 0, queries.stop if self.causal else num_keys)

    def _pattern(self, queries: range, keys: range, batch: MicroBatch) -> Pattern | None:
        """The keys that queries see. None if a mask of queries × keys is needed, because a bias is learned, or cheap,
        because one query is new."""
        bordered = batch.document_ids is not None and self.document_mask
        if self.relative is not None or len(queries) == 1 or (bordered and batch.document_ranges is None):
            return None
        documents = batch.document_ranges if bordered else None
        window = None if self.window is None or len(keys) <= self.window.size else self.window.size
        return Pattern(queries, keys, self.causal, documents, window, biased=isinstance(self.positions, Alibi))

    def _band(self, num_queries: int, num_keys: int, like: Tensor) -> Tensor:
        """[1, 1 or h, n, m]: bias of the last queries of a text on its last keys."""
        places = range(num_keys - num_queries, num_keys)
        if not isinstance(self.positions, Alibi):
            return present(self.window).bias(places, num_keys, like)
        bias = self._of_heads(self.positions.bias(places, num_keys, like))
        if self.window is None:
            return bias
        return bias.masked_fill(self.window.masked(places, num_keys, like.device), -torch.inf)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        keys = self._keys(queries, k.shape[2])
        pattern = self._pattern(queries, keys, batch)
        if pattern is not None:
            return fused_attention(q, k, v, pattern, self.scale, partial(self._band, like=q))
        bias = self._bias(queries, keys, batch, q)
        causal = bias is None and self.causal and len(queries) > 1
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped, scale=self.scale
        )

    def _dropped_core(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        """Attention with dropout on the probabilities, whose masks depend on no layout."""
        bias = self._bias(queries, self._keys(queries, k.shape[2]), batch, q)
        causal = bias is None and self.causal and len(queries) > 1
        rows = self._rows_of_mask(queries, batch, q)
        return dropped_attention(
            q, k, v, rows, self.drop, scale=self.scale, bias=bias, causal=causal, fuse=self.tp.fuse
        )

    def _plain_core(self, q: Tensor, k: Tensor, v: Tensor, queries: range, batch: MicroBatch) -> Tensor:
        """Attention with a cap on the scores, which no fused kernel knows, and with dropout."""
        h, seq = q.shape[1], k.shape[2]
        k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.scale  # [B, h, Q, S]
        if self.softcap is not None:  # before the mask, which it would make finite
            scores = self.softcap * torch.tanh(scores / self.softcap)
        bias = self._bias(queries, self._keys(queries, seq), batch, q)
        if bias is not None:
            scores = scores + bias
        elif self.causal and len(queries) > 1:  # the last query sees the last key
            scores = scores + scores.new_full((len(queries), seq), -torch.inf).triu(1 + seq - len(queries))
        p = scores.softmax(-1)
        if not self._drops:
            return p @ v
        return rng.dropout(p, self.drop, self._rows_of_mask(queries, batch, q), fuse=self.tp.fuse) @ v

    def _rows_of_mask(self, queries: range, batch: MicroBatch, q: Tensor) -> Tensor:
        """int64 [B, h, Q]: keys of the rows of a mask of dropout [B, h, Q, S]."""
        h = q.shape[1]
        rows = mask_rows(self.seed, f"{self.name}.attention", batch, Positions((queries,)), q.device)  # [B, Q]
        heads = torch.arange(self.first_head, self.first_head + h, device=q.device)
        return rng.fold(rows.unsqueeze(1), heads.unsqueeze(1))
