"""Position encodings: sinusoids, ALiBi, T5's relative bias; rotary.py has the rotary embedding. All use
global positions and heads.

B sequences, S positions, D model width, h heads of this rank, K head width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import recorded
from roots_dist.world.sharding import ShardSpec, declare

RANGES = 2
"""Ranges of queries whose biases are kept: a context rank attends from two by turns, any other from one."""


def sinusoids(places: Tensor, width: int, slowest: float = 10000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """places [...] -> dtype [..., D]: sines in the first half, cosines in the second (Vaswani et al. 2017, 3.5,
    reordered). The highest frequency is 1 radian per position, the lowest 1 radian per `slowest` positions."""
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, device=places.device, dtype=dtype) * (-math.log(slowest) / max(1, half - 1)))
    angle = places.unsqueeze(-1) * rate
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :width]


def alibi_slopes(heads: int) -> Tensor:
    """float64 [H], for all heads: 2^(-8i/H) if H is a power of two; otherwise the slopes of the next lower power,
    followed by every second slope of its double (Press et al. 2022; the rule for other H is from their code and
    BLOOM's)."""
    lower = 2 ** math.floor(math.log2(heads))

    def series(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    return torch.tensor(series(lower) + series(2 * lower)[::2][: heads - lower], dtype=torch.float64)


class Alibi:
    """ALiBi: slope times distance, added to attention scores, with the causal mask included. One object serves all
    blocks."""

    def __init__(self, heads: int, mine: slice):
        self.slopes = alibi_slopes(heads)[mine]
        self._made = lru_cache(RANGES)(self._make)

    def bias(self, queries: range, num_keys: int, like: Tensor) -> Tensor:
        """[h, Q, S]: slope × (key - query), -inf where the key comes after the query. Computed in float32 (float64 for
        float64)."""
        return self._made(queries, num_keys, like.device, like.dtype)

    def _make(self, queries: range, num_keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        query = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
        distance = torch.arange(num_keys, device=device) - query  # [Q, S]
        slopes = self.slopes.to(device, torch.promote_types(dtype, torch.float32))
        bias = slopes[:, None, None] * distance
        return bias.masked_fill(distance > 0, -torch.inf).to(dtype)


class Window:
    """Causal attention to the last `size` keys, the query's own included. One object serves all blocks of its kind, and
    keeps the mask last used, which all of them share."""

    def __init__(self, size: int):
        self.size = size
        self._made = lru_cache(RANGES)(self._make)

    def masked(self, queries: range, num_keys: int, device: torch.device) -> Tensor:
        """bool [Q, S]: later keys, and keys that have left the window."""
        place = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
        distance = place - torch.arange(num_keys, device=device)
        return (distance < 0) | (distance >= self.size)

    def bias(self, queries: range, num_keys: int, like: Tensor) -> Tensor:
        """[1, 1, Q, S] in the dtype of `like`: 0, and -inf at masked keys."""
        return self._made(queries, num_keys, like.device, like.dtype)

    def _make(self, queries: range, num_keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        masked = self.masked(queries, num_keys, device)
        return torch.zeros(masked.shape, device=device, dtype=dtype).masked_fill(masked, -torch.inf)[None, None]


class Relative(nn.Module):
    """T5's relative position bias (Raffel et al. 2020, section 2.1): learned per head and bucket of distances, added to
    scores.

    One table serves all blocks of a stack; every pipeline stage with blocks has a copy. Its heads are sharded over
    tensor ranks. Half of the buckets hold single distances, the others grow logarithmically up to
    relative_max_distance; without a causal mask, each direction has half of the buckets.
    """

    def __init__(self, config: Config, tp: TensorParallel, causal: bool, copy_of: str | None = None):
        super().__init__()
        m = config.model
        self.tp = tp
        self.causal, self.buckets, self.distance = causal, m.relative_buckets, m.relative_max_distance
        std = m.init_std or m.hidden**-0.5
        spec = ShardSpec(shape=(self.buckets, m.heads), shard_dim=1, std=std, copy_of=copy_of)
        self.weight = declare(self, "weight", spec, tp.axis)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance key - query, int64."""
        buckets, first = self.buckets, torch.zeros_like(distance)
        if self.causal:
            back = (-distance).clamp(min=0)
        else:
            buckets //= 2
            first, back = (distance > 0) * buckets, distance.abs()
        exact = buckets // 2
        # same order of operations as T5's code: at the edge of a bucket another order rounds to another bucket
        share = torch.log(back.clamp(min=1).float() / exact) / math.log(self.distance / exact)
        far = exact + (share * (buckets - exact)).long()
        return first + torch.where(back < exact, back, far.clamp(max=buckets - 1))

    def bias(self, queries: range, num_keys: int, like: Tensor) -> Tensor:
        """[h, Q, S], without a mask."""
        distances = torch.arange(
            -queries.stop + 1, num_keys - queries.start, device=like.device
        )  # of key - query, Q+S-1
        table = recorded(self.tp, self.weight, context=self.tp.shard_of(queries))
        each = F.embedding(self.bucket(distances), table).t()  # [h, Q+S-1]
        return each.unfold(1, num_keys, 1).flip(1)  # the first window belongs to the last query


def either(masked: Tensor | None, also: Tensor) -> Tensor:
    """The union of two masks; None hides nothing."""
    return also if masked is None else masked | also
