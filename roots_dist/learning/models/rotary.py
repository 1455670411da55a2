"""Rotary embedding (Su et al. 2021), and the rules that change its frequencies for longer texts.

    model.rope_theta, rope_scaling --scaled--> radians per position [w/2] --Rotary--> queries and keys, rotated

B sequences, S positions, h heads of this rank, K head width, w rotated channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from roots_dist.config.model import LayerKind
from roots_dist.config.rope_scaling import Linear, Llama3, LongRope, RopeScaling, Yarn, mscale
from roots_dist.config.schema import Config
from roots_dist.world.fuse import Fuse, eager
from roots_dist.world.positions import Positions


class Rotary:
    """Rotates pairs of channels by an angle that grows with the position: channel i of the first half with channel i of
    the second half, as Llama does, or neighbouring channels (interleaved), as GPT-J does.

    The first w channels of a head are rotated, the others are kept. One object serves all blocks of a kind on a rank,
    and keeps the angles of the positions last used.
    """

    def __init__(
        self,
        width: int,
        theta: float,
        *,
        scaling: RopeScaling | None = None,
        interleaved: bool = False,
        seq: int = 0,
        max_positions: int = 0,
        fuse: Fuse = eager,
    ):
        """width: rotated channels. seq, max_positions: lengths of the run's texts and of the model's, which LongRope
        asks for."""
        self.width, self.theta, self.scaling, self.interleaved = width, theta, scaling, interleaved
        self.seq, self.max_positions, self.rotate = seq, max_positions, fuse(rotate)
        self._key: object = None

    def angles(self, positions: Positions, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [S, w] in the dtype of `like`, computed in float32 (float64 for float64)."""
        key = (positions, like.device, like.dtype)
        if key != self._key:
            exact = torch.promote_types(like.dtype, torch.float32)
            pair = torch.arange(0, self.width, 2, device=like.device, dtype=exact) / self.width
            rates = scaled(self.theta**-pair, self.theta, self.scaling, self.seq)
            size = attention_factor(self.scaling, self.max_positions)

            def turns(r: range) -> tuple[Tensor, Tensor]:
                angle = torch.outer(Positions((r,)).places(like.device, exact), rates)
                angle = angle.repeat_interleave(2, 1) if self.interleaved else angle.repeat(1, 2)  # [S, w]
                return (size * angle.cos()).to(like.dtype), (size * angle.sin()).to(like.dtype)

            # range by range, so that who holds others changes no bit: a kernel's tail rounds otherwise
            cos, sin = (torch.cat(parts) for parts in zip(*map(turns, positions.ranges)))
            self._key, self._angles = key, (cos, sin)
        return self._angles

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        """[B, h, S, K] -> the same shape, rotated by the angles of each position."""
        out: Tensor = _Turn.apply(  # type: ignore[no-untyped-call] # torch types no apply
            x, *self.angles(positions, x), self.interleaved, self.rotate
        )
        return out


class _Turn(torch.autograd.Function):
    """A rotation, whose gradient is rotated back. Nothing of x is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotate: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.rotate = interleaved, rotate
        return rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, sin, ctx.interleaved, -1), None, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int = 1) -> Tensor:
    """Each pair (a, b) of x [B, h, S, K] -> (a cos - b sin, b cos + a sin); what cos and sin [S, w] do not reach is
    kept."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    out = turned * cos
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(width // 2), slice(width // 2, None))
    )
    out[..., first].addcmul_(turned[..., second], sin[..., first], value=-sign)
    out[..., second].addcmul_(turned[..., first], sin[..., second], value=sign)
    return torch.cat([out, kept], -1) if kept.shape[-1] else out


def scaled(rates: Tensor, theta: float, scaling: RopeScaling | None, seq: int) -> Tensor:
    """Radians per position [w/2] by the rule, in the dtype of `rates`, which are those without one."""
    if scaling is None:
        return rates
    if isinstance(scaling, Linear):
        return rates / scaling.factor
    if isinstance(scaling, Llama3):
        return _llama3(rates, scaling)
    if isinstance(scaling, Yarn):
        return _yarn(rates, theta, scaling)
    factors = scaling.long_factor if seq > scaling.original_length else scaling.short_factor
    return rates / torch.tensor(factors, dtype=rates.dtype, device=rates.device)


def _llama3(rates: Tensor, scaling: Llama3) -> Tensor:
    turns = scaling.original_length * rates / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for short wavelengths, 0 for long ones
    return rates * ((1 - kept) / scaling.factor + kept)


def _yarn(rates: Tensor, theta: float, scaling: Yarn) -> Tensor:
    half = len(rates)

    def pair_with(turns: float) -> float:
        """The pair of channels that turns so often over the original length; not a whole number."""
        return half * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    last += 0.001 * (last == first)  # as in YaRN's code
    pair = torch.arange(half, dtype=rates.dtype, device=rates.device)
    divided = ((pair - first) / (last - first)).clamp(0, 1)
    return rates * (divided / scaling.factor + (1 - divided))


def attention_factor(scaling: RopeScaling | None, max_positions: int) -> float:
    """The factor on cos and sin."""
    if isinstance(scaling, Yarn):
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        if scaling.mscale and scaling.mscale_all_dim:
            return mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
        return mscale(scaling.factor, 1.0)
    if isinstance(scaling, LongRope):
        longer = max_positions / scaling.original_length
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        return math.sqrt(1 + math.log(longer) / math.log(scaling.original_length)) if longer > 1 else 1.0
    return 1.0


def rotary_of(config: Config, kind: LayerKind, fuse: Fuse = eager) -> Rotary | None:
    """The rotary embedding of blocks of this kind; None for those without."""
    m = config.model
    if kind == "nope":
        return None
    own = kind == "window" and m.window_rope_theta is not None
    return Rotary(
        m.rotary_width(),
        m.window_rope_theta if own and m.window_rope_theta else m.rope_theta,
        scaling=None if own else m.rope_scaling,
        interleaved=m.rotary_interleaved,
        seq=config.data.seq_length,
        max_positions=m.max_positions or config.data.seq_length,
        fuse=fuse,
    )
