"""Attention with dropout on its probabilities in plain torch, a few heads at a time: their scores stay in a CPU's
cache, and of all that is queries × keys only the mask is kept, a byte for each pair.

dropped_attention.py --on a CPU, and in float64--> forward, backward. B sequences, h query heads, g key/value heads,
Q queries, S keys, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from roots_dist.world import rng

PAIRS = 1 << 18
"""Pairs of a query and a key that are computed at one time: a megabyte in float32."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, drop: float, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """[B, h, Q, K], twice [B, g, S, K], bias that broadcasts to [B, h, Q, S], rows int64 [B, h, Q] -> [B, h, Q, K], and
    what is dropped, bool [B, h, Q, S]."""
    k, v = repeat_heads(k, v, q.shape[1])
    dropped = rng.mask(rows, drop, k.shape[2]).logical_not_()
    out = torch.empty_like(q)
    for part in parts_of(q, k):
        p = _probabilities(q, k, bias, part, scale, causal).masked_fill_(dropped[part], 0)
        out[part] = (p @ v[part]).mul_(1 / (1 - drop))
    return out, dropped


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, out: Tensor, dropped: Tensor,
    drop: float, scale: float, causal: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of the bias. Probabilities are computed again."""

    def of_part(part: tuple[int, slice], k: Tensor, grad_p: Tensor) -> tuple[Tensor, Tensor]:
        p, grad_p = _probabilities(q, k, bias, part, scale, causal), grad_p.masked_fill_(dropped[part], 0)
        scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        return p.masked_fill_(dropped[part], 0), scores

    return gradients(of_part, grad, q, k, v, bias if need_bias else None, drop, scale, PAIRS)


def gradients(
    of_part: Callable[[tuple[int, slice], Tensor, Tensor], tuple[Tensor, Tensor]],
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, drop: float, scale: float, pairs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of the bias. of_part(part, keys of each query head, gradient of the probabilities) ->
    probabilities that dropout leaves, and the gradient of the scaled products."""
    groups = k.shape[1]
    k, v = repeat_heads(k, v, q.shape[1])
    grads = [torch.empty_like(t) for t in (q, k, v)]
    grad_bias = torch.zeros_like(bias) if bias is not None else None
    for part in parts_of(q, k, pairs):
        given = grad[part] * (1 / (1 - drop))
        p, scores = of_part(part, k, given @ v[part].transpose(-1, -2))
        grads[2][part] = p.transpose(-1, -2) @ given
        if grad_bias is not None:
            into = slice_of(grad_bias, part)
            into += scores.sum_to_size(into.shape)
        grads[0][part] = (scores @ k[part]).mul_(scale)
        grads[1][part] = (scores.transpose(-1, -2) @ q[part]).mul_(scale)
    grad_q, *grad_kv = grads
    grad_k, grad_v = (t if t.shape[1] == groups else t.unflatten(1, (groups, -1)).sum(2) for t in grad_kv)
    return grad_q, grad_k, grad_v, grad_bias


def repeat_heads(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """One key and one value for each query head."""
    if k.shape[1] == heads:
        return k, v
    repeated = heads // k.shape[1]
    return k.repeat_interleave(repeated, 1), v.repeat_interleave(repeated, 1)


def parts_of(q: Tensor, k: Tensor, pairs: int = PAIRS) -> Iterator[tuple[int, slice]]:
    """Indices of one sequence and some heads, which together are all."""
    size = max(1, pairs // (q.shape[2] * k.shape[2]))
    for b in range(q.shape[0]):
        for first in range(0, q.shape[1], size):
            yield b, slice(first, first + size)


def slice_of(bias: Tensor, part: tuple[int, slice]) -> Tensor:
    """The part of what broadcasts to [B, h, Q, S]."""
    b, heads = part
    one: Tensor = bias[b if bias.shape[0] > 1 else 0]
    return one[heads] if one.shape[0] > 1 else one


def _probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, part: tuple[int, slice], scale: float, causal: bool
) -> Tensor:
    """Softmax of the part's scores, [heads, Q, S], before dropout."""
    scores: Any = (q[part] @ k[part].transpose(-1, -2)).mul_(scale)
    if bias is not None:
        scores += slice_of(bias, part)
    if causal:  # the last query sees the last key
        queries, keys = scores.shape[1:]
        scores += scores.new_full((queries, keys), -torch.inf).triu_(1 + keys - queries)
    made: Tensor = scores.softmax(-1)
    return made
