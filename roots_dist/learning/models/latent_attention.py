"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1): keys and values of all heads are made from
one narrow vector of their position, the latent, and so may queries be.

    x --query_down--> latent of queries, normed --query--> of each head N channels, and R to be rotated
    x --query--------------------------------------------> the same, where queries have no latent
    x --kv_down--> R channels to be rotated, of the keys of all heads
                   latent of keys and values, normed --kv_up--> of each head N channels of the key, V of the value

What leads down is whole on every tensor rank and lies outside of the tensor-parallel region, so that only the latents
enter it; what leads up is sharded by heads. From there on it is attention as any other (attention.py), with keys of
N + R channels, to which values are filled up with zeros: kernels ask for one width. B sequences, S positions, D model
width, h heads of this rank, L and L' widths of the latents, s positions of this rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.attention import Attention
from roots_dist.learning.models.init_stds import InitStds
from roots_dist.learning.models.norms import Norm
from roots_dist.learning.models.rotary import Rotary
from roots_dist.parallel.tensor.collectives import copy_to_tp_region
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, column_parallel
from roots_dist.parallel.tensor.replicated import ReplicatedLinear
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import SINGLE
from roots_dist.world.positions import Positions

NORM_EPS = 1e-6
"""The epsilon of the norms of latents, whatever the others have: as in the code of DeepSeek, and in transformers'."""


class LatentAttention(Attention):
    """Self-attention by latents."""

    def _make_projections(self, config: Config, init_stds: InitStds) -> None:
        m, tp = config.model, self.tp
        self.plain, self.turned, self.value_dim = m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim
        self.latent = present(m.kv_lora_rank)
        self.query_down: ReplicatedLinear | None = None
        self.query_down_norm: Norm | None = None
        if m.q_lora_rank is not None:
            self.query_down = ReplicatedLinear(tp, m.hidden, m.q_lora_rank, init_stds.query)
            self.query_down_norm = Norm(config, tp, m.q_lora_rank, eps=NORM_EPS)
        self.kv_down = ReplicatedLinear(tp, m.hidden, self.latent + self.turned, init_stds.key)
        self.kv_down_norm = Norm(config, tp, self.latent, eps=NORM_EPS)

        def by_heads(width: int, of_head: int, std: float) -> ColumnParallelLinear:
            return ColumnParallelLinear(tp, width, m.heads * of_head, bias=False, std=std, parts=m.heads)

        self.query = by_heads(m.q_lora_rank or m.hidden, self.head_dim, init_stds.query)
        self.kv_up = by_heads(self.latent, self.plain + self.value_dim, init_stds.key)

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        gather = self._new_gather()
        latent, shared = self._enter(x)
        places = self.tp.in_region(latent.shape[1]).after(batch.cache.length if batch.cache else 0)
        k, v = self._keys_and_values_of(latent, shared, places)
        if batch.cache is not None:
            k, v = batch.cache.extend(self.name, k, v, keep=None if self.window is None else self.window.size - 1)
        v = F.pad(v, (0, self.head_dim - self.value_dim))
        if self.tp.cp.size > 1 and not self.tp.exchanges_heads:
            with torch.no_grad():
                gather.start(torch.stack([k, v]))  # while queries are computed
        mixed = self._attend(self._queries(x, places), k, v, places, batch, gather)
        values = mixed.unflatten(-1, (-1, self.head_dim))[..., : self.value_dim]
        return self._leave(values.flatten(-2), gather)

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, s, D] -> the latent of keys and values [B, S, L], and the channels [B, S, R] that keys share, in the
        region."""
        latent, shared = self.kv_down(x).split([self.latent, self.turned], -1)
        both = copy_to_tp_region(torch.cat([self.kv_down_norm(latent), shared], -1), self.tp)
        latent, shared = both.split([self.latent, self.turned], -1)
        return latent, shared

    def _keys_and_values_of(self, latent: Tensor, shared: Tensor, places: Positions) -> tuple[Tensor, Tensor]:
        """-> [B, h, S, N+R], [B, h, S, V]"""
        inside = replace(self.tp, axis=SINGLE, sequence_parallel=False)  # with the same deferred gradients
        (up,) = column_parallel(inside, latent, [self.kv_up])
        k, v = _by_heads(up, self.plain + self.value_dim).split([self.plain, self.value_dim], -1)
        turned = self._rotated(shared.unsqueeze(1), places).expand(-1, k.shape[1], -1, -1)
        return torch.cat([k, turned], -1), v

    def _queries(self, x: Tensor, places: Positions) -> Tensor:
        """[B, s, D] -> [B, h, S, N+R]"""
        if self.query_down is not None:
            x = present(self.query_down_norm)(self.query_down(x))
        (q,) = column_parallel(self.tp, x, [self.query])
        plain, turned = _by_heads(q, self.head_dim).split([self.plain, self.turned], -1)
        return torch.cat([plain, self._rotated(turned, places)], -1)

    def _rotated(self, x: Tensor, places: Positions) -> Tensor:
        return self.positions(x, places) if isinstance(self.positions, Rotary) else x


def _by_heads(x: Tensor, width: int) -> Tensor:
    """[B, S, h*width] -> [B, h, S, width]"""
    heads: Tensor = x.unflatten(-1, (-1, width))
    return heads.transpose(1, 2)


def latent_attention_flops(config: Config, seq: int, keys: float) -> float:
    """Forward FLOPs of `seq` positions that attend to `keys` each. Zeros that values are filled up with are not
    counted."""
    m = config.model
    latent, width, heads = m.kv_lora_rank or 0, m.width_of_head(), m.heads
    queries = m.hidden * heads * width
    if m.q_lora_rank is not None:
        queries = m.q_lora_rank * (m.hidden + heads * width)
    down = m.hidden * (latent + m.qk_rope_head_dim)
    up = latent * heads * (m.qk_nope_head_dim + m.v_head_dim)
    out = heads * m.v_head_dim * m.hidden
    return 2.0 * seq * (queries + down + up + out) + 2.0 * seq * keys * heads * (width + m.v_head_dim)
