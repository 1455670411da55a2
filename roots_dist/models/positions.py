"""Where a token stands: learned or sinusoidal vectors, rotary angles, ALiBi slopes. All in global positions and heads.

B sequences, S positions, D model width, h heads of this rank, K head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(positions: range, width: int, device: torch.device) -> Tensor:
    """float32 [s, D]: sines in the first half, cosines in the second (Vaswani et al. 2017, 3.5, reordered)."""
    place = torch.arange(positions.start, positions.stop, device=device).unsqueeze(1)
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / max(1, half - 1)))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], 1)[:, :width]


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
