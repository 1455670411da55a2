"""Attention with dropout on its probabilities on a CPU whose functions are compiled (train.compile): between two
products, scale, bias, causal mask, softmax, hash and dropout are one kernel. Nothing of queries × keys is kept.

dropped_attention.py --compiled, on a CPU, and in float64--> forward, backward. B sequences, h query heads, g key/value
heads, Q queries, S keys, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roots_dist.learning.models.attention_by_heads import gradients, parts_of, repeat_heads, slice_of
from roots_dist.world import rng
from roots_dist.world.fuse import Fuse

PAIRS = 1 << 21
"""Pairs of a query and a key that are computed at one time: a row of them stays in a CPU's cache, whatever their
number, and calls cost less."""


@dataclass(frozen=True)
class FusedByHeads:
    """The functions of attention_by_heads.py, which keep no mask."""

    fuse: Fuse

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, drop: float, scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        k, v = repeat_heads(k, v, q.shape[1])
        out = torch.empty_like(q)
        for part in parts_of(q, k, PAIRS):
            scores = q[part] @ k[part].transpose(-1, -2)
            p = self.fuse(dropped_softmax)(scores, rows[part], *_settings(bias, part, drop, scale, causal))
            out[part] = (p @ v[part]).mul_(1 / (1 - drop))
        return out, rows.new_empty(0)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, out: Tensor,
        nothing: Tensor, drop: float, scale: float, causal: bool, need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        def of_part(part: tuple[int, slice], k: Tensor, grad_p: Tensor) -> tuple[Tensor, Tensor]:
            scores, settings = q[part] @ k[part].transpose(-1, -2), _settings(bias, part, drop, scale, causal)
            return self.fuse(dropped_softmax_backward)(grad_p, scores, rows[part], *settings)

        return gradients(of_part, grad, q, k, v, bias if need_bias else None, drop, scale, PAIRS)


def _settings(
    bias: Tensor | None, part: tuple[int, slice], drop: float, scale: float, causal: bool
) -> tuple[Tensor | None, int, float, bool]:
    return None if bias is None else slice_of(bias, part), rng.limit_of(drop), scale, causal


def dropped_softmax(
    scores: Tensor, rows: Tensor, bias: Tensor | None, limit: int, scale: float, causal: bool
) -> Tensor:
    """Products of queries and keys [heads, Q, S], keys of the mask's rows [heads, Q] -> probabilities, of which dropout
    leaves some."""
    p = _softmax(scores, bias, scale, causal)
    return torch.where(rng.whole_mask(rows, limit, scores.shape[-1]), p, 0.0)


def dropped_softmax_backward(
    grad_p: Tensor, scores: Tensor, rows: Tensor, bias: Tensor | None, limit: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The probabilities again, and the gradient of the scaled products."""
    p, kept = _softmax(scores, bias, scale, causal), rng.whole_mask(rows, limit, scores.shape[-1])
    grad = torch.where(kept, grad_p, 0.0)
    return torch.where(kept, p, 0.0), p * (grad - (grad * p).sum(-1, keepdim=True))


def _softmax(scores: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = scores * scale
    if bias is not None:
        scores = scores + bias
    if causal:  # the last query sees the last key
        queries, keys = scores.shape[1:]
        place = torch.arange(queries, device=scores.device).unsqueeze(1) + (keys - queries)
        scores = scores.masked_fill(torch.arange(keys, device=scores.device) > place, -torch.inf)
    return scores.softmax(-1)
