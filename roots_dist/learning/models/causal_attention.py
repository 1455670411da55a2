"""Causal attention of a later range of queries to all keys up to its end, without a mask of queries × keys.

    keys before the range: attended without a mask \
    keys of the range itself: causal                > merged by their log-sum-exp (Dao 2023, section 3.1)

B sequences, h query heads, g key/value heads, Q queries, S ≥ Q keys, K head width. The last query sees the last key.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Merged(torch.autograd.Function):
    """Two calls of the CPU's fused kernel. Each one's backward takes the output and log-sum-exp of both together."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        parts = []
        for keys, causal in _halves(q, k):
            parts.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
                )
            )
        (before, before_lse), (own, own_lse) = parts
        lse = torch.logaddexp(before_lse, own_lse)  # [B, h, Q], as wide as the kernel adds
        out = before * (before_lse - lse).exp().unsqueeze(-1) + own * (own_lse - lse).exp().unsqueeze(-1)
        merged: Tensor = out.to(q.dtype)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, merged, lse)
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        found = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k[:, :, keys], v[:, :, keys], out, lse, 0.0, causal, scale=ctx.scale
            )
            for keys, causal in _halves(q, k)
        ]
        (before_q, *before), (own_q, *own) = found
        grad_k, grad_v = (torch.cat(pair, 2) for pair in zip(before, own))
        return before_q + own_q, grad_k, grad_v, None


def _halves(q: Tensor, k: Tensor) -> tuple[tuple[slice, bool], tuple[slice, bool]]:
    """The keys before the range of queries, and those of the range; and whether a query sees only those before it."""
    start = k.shape[2] - q.shape[2]
    return (slice(0, start), False), (slice(start, k.shape[2]), True)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, h, Q, K], twice [B, g, S, K] with S > Q -> [B, h, Q, K]."""
    if q.device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # brings torch._dynamo, which takes seconds

        bias: Any = causal_lower_right(q.shape[2], k.shape[2])  # the fused kernels know this one
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1], scale=scale)
    out: Tensor = _Merged.apply(q, k, v, scale)  # type: ignore[no-untyped-call] # torch types no apply
    return out
