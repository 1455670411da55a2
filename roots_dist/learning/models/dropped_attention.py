"""Attention with dropout on its probabilities, with masks that no layout changes: nothing of queries × keys is kept, or
on a CPU only the mask.

    kernels_for(q): attention_triton.py on a GPU, attention_by_heads.py on a CPU and in float64, fused_by_heads.py there
    where the run compiles

B sequences, h query heads, g key/value heads, Q queries, S keys, K head width.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from roots_dist.learning.models import attention_by_heads
from roots_dist.learning.models.fused_by_heads import FusedByHeads
from roots_dist.world import rng
from roots_dist.world.fuse import Fuse, eager


class AttentionKernels(Protocol):
    """The interface of attention_triton.py. Beside the output, forward gives a tensor that backward needs."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, drop: float, scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, out: Tensor,
        lse: Tensor, drop: float, scale: float, causal: bool, need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...  # fmt: skip


class CountedAttentionKernels:
    """Stand for the kernels where they are counted: as many operations, which read and write as much. The two of
    backward compute nine products between them, of which five and two are counted; that of the bias three more, of
    which two are."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, drop: float, scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        made: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal and q.shape[2] == k.shape[2], attn_mask=_expanded(bias, q, k), scale=scale
        )
        return made

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, out: Tensor,
        lse: Tensor, drop: float, scale: float, causal: bool, need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        causal = causal and q.shape[2] == k.shape[2]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_expanded(bias, q, k), scale=scale
        )
        self.forward(q, k, v, bias, rows, drop, scale, causal)
        return *grads, torch.zeros_like(bias) if bias is not None and need_bias else None


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.detach().expand(*q.shape[:3], k.shape[2])


def kernels_for(q: Tensor, fuse: Fuse) -> AttentionKernels:
    """Choose the kernels for a tensor's device and dtype."""
    of_masks = rng.kernels_of(q.device)
    if of_masks is None or q.dtype == torch.float64:  # a kernel computes in float32
        return cast("AttentionKernels", attention_by_heads) if fuse is eager else FusedByHeads(fuse)
    if isinstance(of_masks, rng.CountedKernels):
        return CountedAttentionKernels()
    from roots_dist.learning.models import attention_triton

    return cast("AttentionKernels", attention_triton)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, drop: float, scale: float,
        causal: bool, kernels: AttentionKernels,
    ) -> Tensor:  # fmt: skip
        out, kept = kernels.forward(q, k, v, bias, rows, drop, scale, causal)
        ctx.save_for_backward(q, k, v, bias, rows, out, kept)
        ctx.told, ctx.kernels = (drop, scale, causal), kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.kernels.backward(grad, *ctx.saved_tensors, *ctx.told, ctx.needs_input_grad[3])
        return *found, *(None,) * 5


def dropped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    drop: float,
    *,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
    fuse: Fuse = eager,
) -> Tensor:
    """[B, h, Q, K], twice [B, g, S, K] -> [B, h, Q, K]. rows: int64 [B, h, Q], the keys of the mask's rows. bias
    broadcasts to [B, h, Q, S]. causal: besides, and the last query sees the last key."""
    out: Tensor = _Dropped.apply(  # type: ignore[no-untyped-call] # torch types no apply
        q, k, v, bias, rows, drop, scale, causal, kernels_for(q, fuse)
    )
    return out
