"""Where a token stands: sinusoids, rotary angles, ALiBi slopes, T5's learned bias. All in global positions and heads.

B sequences, S positions, D model width, h heads of this rank, K head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.sharding import ShardSpec, declare


def sinusoids(places: Tensor, width: int, slowest: float = 10000.0) -> Tensor:
    """places [...] -> float32 [..., D]: sines in the first half, cosines in the second (Vaswani et al. 2017, 3.5,
    reordered). The fastest turns by 1 a place, the slowest by 1 in `slowest` places."""
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, device=places.device) * (-math.log(slowest) / max(1, half - 1)))
    angle = places.unsqueeze(-1) * rate
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :width]


class Rotary:
    """Rotary embedding (Su et al. 2021), the two halves of a head rotated against each other as Llama does.

    One object serves all blocks of a rank: the angles of the positions last asked for are kept.
    """

    def __init__(self, head_dim: int, theta: float):
        self.head_dim, self.theta = head_dim, theta
        self._key: object = None

    def angles(self, positions: range, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [S, K] in the dtype of `like`, computed in float32 (float64 for float64)."""
        key = (positions, like.device, like.dtype)
        if key != self._key:
            exact = torch.promote_types(like.dtype, torch.float32)
            pair = torch.arange(0, self.head_dim, 2, device=like.device, dtype=exact) / self.head_dim
            place = torch.arange(positions.start, positions.stop, device=like.device, dtype=exact)
            angle = torch.outer(place, self.theta**-pair).repeat(1, 2)  # [S, K]
            self._key, self._angles = key, (angle.cos().to(like.dtype), angle.sin().to(like.dtype))
        return self._angles

    def __call__(self, x: Tensor, positions: range) -> Tensor:
        """[B, h, S, K] -> the same, each position's head turned by its angles."""
        cos, sin = self.angles(positions, x)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin


def alibi_slopes(heads: int) -> Tensor:
    """float32 [H], global heads: 2^(-8i/H) for a power of two, else that of the next lower power and, between, of its
    double (Press et al. 2022; the rule for other numbers is of their code, and BLOOM's)."""
    lower = 2 ** math.floor(math.log2(heads))

    def series(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    return torch.tensor(series(lower) + series(2 * lower)[::2][: heads - lower])


class Alibi:
    """Distance times slope, added to attention scores, with the causal mask in it. One object serves all blocks."""

    def __init__(self, heads: int, mine: slice):
        self.slopes = alibi_slopes(heads)[mine]
        self._key: object = None

    def bias(self, queries: range, num_keys: int, like: Tensor) -> Tensor:
        """[h, Q, S]: slope × (key - query), -inf where the key comes after the query."""
        key = (queries, num_keys, like.device, like.dtype)
        if key != self._key:
            query = torch.arange(queries.start, queries.stop, device=like.device).unsqueeze(1)
            distance = torch.arange(num_keys, device=like.device) - query  # [Q, S]
            bias = self.slopes.to(like.device)[:, None, None] * distance
            self._key, self._bias = key, bias.masked_fill(distance > 0, -torch.inf).to(like.dtype)
        return self._bias


class Relative(nn.Module):
    """T5's bias (Raffel et al. 2020, section 2.1): learned per head and bucket of distance, added to attention scores.

    One table for all blocks of a stack; a copy on every pipeline stage that has some. Its heads are cut over tensor
    ranks. Half of the buckets are for single distances, the others grow with the logarithm up to relative_distance;
    where keys may come after the query, each side has half of the buckets.
    """

    def __init__(self, config: Config, tp: TensorParallel, causal: bool, copy_of: str | None = None):
        super().__init__()
        m = config.model
        self.causal, self.buckets, self.distance = causal, m.relative_buckets, m.relative_max_distance
        std = m.init_std or m.hidden**-0.5
        spec = ShardSpec(shape=(self.buckets, m.heads), cut=1, std=std, copy_of=copy_of)
        self.weight = declare(self, "weight", spec, tp.axis)

    def bucket(self, distance: Tensor) -> Tensor:
        """int64, of key - query."""
        buckets, first = self.buckets, torch.zeros_like(distance)
        if self.causal:
            back = (-distance).clamp(min=0)
        else:
            buckets //= 2
            first, back = (distance > 0) * buckets, distance.abs()
        exact = buckets // 2
        # in the order of T5's code: at the border of a bucket another order rounds to another bucket
        share = torch.log(back.clamp(min=1).float() / exact) / math.log(self.distance / exact)
        far = exact + (share * (buckets - exact)).long()
        return first + torch.where(back < exact, back, far.clamp(max=buckets - 1))

    def bias(self, queries: range, num_keys: int, like: Tensor) -> Tensor:
        """[h, Q, S], without any mask."""
        distances = torch.arange(
            -queries.stop + 1, num_keys - queries.start, device=like.device
        )  # of key - query, Q+S-1
        each = F.embedding(self.bucket(distances), self.weight).t()  # [h, Q+S-1]
        return each.unfold(1, num_keys, 1).flip(1)  # the window of the last query begins first
