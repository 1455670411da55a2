"""Attention with dropout on its probabilities as Triton kernels: scores, probabilities and masks exist for one tile at
a time, and backward computes them again (Dao 2023). The masks are those of world/rng.py, to the bit.

Imported only where a GPU is used; tests run the kernels in Triton's interpreter. B sequences, h heads in g groups of
the same key and value, Q queries, S keys, K head width. Computed in float32; products have factors of the inputs'
dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from roots_dist.world.rng import limit_of
from roots_dist.world.rng_triton import hash_bits

QUERIES, KEYS = 64, 64
"""Rows and columns of a tile."""


@triton.jit
def _tile(ptr: Any, rows: Any, stride: Any, num_rows: Any, width: tl.constexpr, padded: tl.constexpr) -> Any:
    """[rows, padded]: rows of a matrix whose last dimension is contiguous, zero beyond its end."""
    column = tl.arange(0, padded)
    inside = (rows < num_rows)[:, None] & (column < width)[None, :]
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(
    q: Any,
    k: Any,
    bias_ptr: Any,
    query: Any,
    key: Any,
    bias2: Any,
    bias3: Any,
    queries: Any,
    keys: Any,
    scale: Any,
    causal: tl.constexpr,
    biased: tl.constexpr,
) -> Any:
    """float32 [queries, keys] of a tile, -inf where a query must not see a key."""
    seen = (key < keys)[None, :] & (query < queries)[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if biased:
        at = bias_ptr + query[:, None] * bias2 + key[None, :] * bias3
        scores += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    if causal:  # the last query sees the last key
        seen &= key[None, :] <= query[:, None] + (keys - queries)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _kept(rows: Any, key: Any, limit: Any) -> Any:
    """bool [queries, keys]: what dropout keeps, by the keys of the mask's rows."""
    return hash_bits(rows[:, None], key[None, :]) >= limit


@triton.jit
def _forward_kernel(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, bias_ptr: Any, rows_ptr: Any, out_ptr: Any, lse_ptr: Any,
    q0: Any, q1: Any, q2: Any, k0: Any, k1: Any, k2: Any, v0: Any, v1: Any, v2: Any,
    bias0: Any, bias1: Any, bias2: Any, bias3: Any, out0: Any, out1: Any, out2: Any,
    heads: Any, group: Any, queries: Any, keys: Any, scale: Any, limit: Any, factor: Any,
    causal: tl.constexpr, biased: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    query = tl.program_id(0) * block_q + tl.arange(0, block_q)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    at = tl.program_id(1).to(tl.int64) * queries + query
    rows = tl.load(rows_ptr + at, mask=query < queries, other=0)
    q = _tile(q_ptr + b * q0 + h * q1, query, q2, queries, width, padded)
    k_ptr += b * k0 + h // group * k1
    v_ptr += b * v0 + h // group * v1
    bias_ptr += b * bias0 + h * bias1
    top = tl.full([block_q], float("-inf"), tl.float32)
    total = tl.zeros([block_q], tl.float32)
    mixed = tl.zeros([block_q, padded], tl.float32)
    end = keys
    if causal:
        end = tl.minimum(keys, (tl.program_id(0) + 1) * block_q + keys - queries)
    for start in range(0, end, block_k):
        key = start + tl.arange(0, block_k)
        k = _tile(k_ptr, key, k2, keys, width, padded)
        v = _tile(v_ptr, key, v2, keys, width, padded)
        scores = _scores(q, k, bias_ptr, query, key, bias2, bias3, queries, keys, scale, causal, biased)
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(scores - base[:, None])
        again = tl.exp(top - base)
        total = total * again + tl.sum(p, 1)
        p = tl.where(_kept(rows, key, limit), p * factor, 0.0)
        mixed = mixed * again[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    inside = query < queries
    tl.store(lse_ptr + at, top + tl.log(total), mask=inside)
    column = tl.arange(0, padded)
    out_ptr += b * out0 + h * out1
    mixed = mixed / total[:, None]
    within = inside[:, None] & (column < width)[None, :]
    tl.store(out_ptr + query[:, None] * out2 + column[None, :], mixed.to(q.dtype), mask=within)


@triton.jit
def _backward_tile(
    q: Any, k: Any, v: Any, grad: Any, lse: Any, delta: Any, rows: Any, bias_ptr: Any, query: Any, key: Any,
    bias2: Any, bias3: Any, queries: Any, keys: Any, scale: Any, limit: Any, factor: Any,
    causal: tl.constexpr, biased: tl.constexpr,
) -> Any:  # fmt: skip
    """The dropped probabilities of a tile, and the gradient of its scores, float32 [queries, keys] each."""
    scores = _scores(q, k, bias_ptr, query, key, bias2, bias3, queries, keys, scale, causal, biased)
    p = tl.exp(scores - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    kept = _kept(rows, key, limit)
    grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    grad_scores = p * (tl.where(kept, grad_p * factor, 0.0) - delta[:, None])
    return tl.where(kept, p * factor, 0.0), grad_scores


@triton.jit
def _backward_queries_kernel(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, bias_ptr: Any, rows_ptr: Any, out_ptr: Any, lse_ptr: Any, grad_ptr: Any,
    delta_ptr: Any, grad_q_ptr: Any,
    q0: Any, q1: Any, q2: Any, k0: Any, k1: Any, k2: Any, v0: Any, v1: Any, v2: Any,
    bias0: Any, bias1: Any, bias2: Any, bias3: Any, out0: Any, out1: Any, out2: Any,
    heads: Any, group: Any, queries: Any, keys: Any, scale: Any, limit: Any, factor: Any,
    causal: tl.constexpr, biased: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of queries; and delta, the sum of out · gradient over a head's width. Output, its gradient and the
    queries' gradient have the same strides."""
    query = tl.program_id(0) * block_q + tl.arange(0, block_q)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    at, inside = tl.program_id(1).to(tl.int64) * queries + query, query < queries
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    q = _tile(q_ptr + b * q0 + h * q1, query, q2, queries, width, padded)
    own = b * out0 + h * out1
    grad = _tile(grad_ptr + own, query, out2, queries, width, padded)
    out = _tile(out_ptr + own, query, out2, queries, width, padded)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=inside)
    k_ptr += b * k0 + h // group * k1
    v_ptr += b * v0 + h // group * v1
    bias_ptr += b * bias0 + h * bias1
    grad_q = tl.zeros([block_q, padded], tl.float32)
    end = keys
    if causal:
        end = tl.minimum(keys, (tl.program_id(0) + 1) * block_q + keys - queries)
    for start in range(0, end, block_k):
        key = start + tl.arange(0, block_k)
        k = _tile(k_ptr, key, k2, keys, width, padded)
        v = _tile(v_ptr, key, v2, keys, width, padded)
        _, grad_scores = _backward_tile(
            q, k, v, grad, lse, delta, rows, bias_ptr, query, key, bias2, bias3, queries, keys, scale, limit, factor,
            causal, biased,
        )  # fmt: skip
        grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision="ieee")
    column = tl.arange(0, padded)
    within = inside[:, None] & (column < width)[None, :]
    to = grad_q_ptr + own + query[:, None] * out2 + column[None, :]
    tl.store(to, (grad_q * scale).to(q.dtype), mask=within)


@triton.jit
def _backward_keys_kernel(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, bias_ptr: Any, rows_ptr: Any, lse_ptr: Any, grad_ptr: Any, delta_ptr: Any,
    grad_k_ptr: Any, grad_v_ptr: Any,
    q0: Any, q1: Any, q2: Any, k0: Any, k1: Any, k2: Any, v0: Any, v1: Any, v2: Any,
    bias0: Any, bias1: Any, bias2: Any, bias3: Any, out0: Any, out1: Any, out2: Any, own0: Any, own1: Any, own2: Any,
    heads: Any, group: Any, queries: Any, keys: Any, scale: Any, limit: Any, factor: Any,
    causal: tl.constexpr, biased: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of keys and values, summed over the heads of a group."""
    key = tl.program_id(0) * block_k + tl.arange(0, block_k)
    groups = heads // group
    b, g = tl.program_id(1) // groups, tl.program_id(1) % groups
    k = _tile(k_ptr + b * k0 + g * k1, key, k2, keys, width, padded)
    v = _tile(v_ptr + b * v0 + g * v1, key, v2, keys, width, padded)
    grad_k = tl.zeros([block_k, padded], tl.float32)
    grad_v = tl.zeros([block_k, padded], tl.float32)
    first = 0
    if causal:  # earlier queries do not see these keys
        first = tl.maximum(0, tl.program_id(0) * block_k - (keys - queries)) // block_q * block_q
    for member in range(group):
        h = g * group + member
        for start in range(first, queries, block_q):
            query = start + tl.arange(0, block_q)
            at, inside = (b * heads + h).to(tl.int64) * queries + query, query < queries
            rows = tl.load(rows_ptr + at, mask=inside, other=0)
            lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
            q = _tile(q_ptr + b * q0 + h * q1, query, q2, queries, width, padded)
            grad = _tile(grad_ptr + b * out0 + h * out1, query, out2, queries, width, padded)
            p, grad_scores = _backward_tile(
                q, k, v, grad, lse, delta, rows, bias_ptr + b * bias0 + h * bias1, query, key, bias2, bias3, queries,
                keys, scale, limit, factor, causal, biased,
            )  # fmt: skip
            grad_v += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
            grad_k += tl.dot(tl.trans(grad_scores.to(q.dtype)), q, input_precision="ieee")
    column = tl.arange(0, padded)
    within = (key < keys)[:, None] & (column < width)[None, :]
    to = b * own0 + g * own1 + key[:, None] * own2 + column[None, :]
    tl.store(grad_k_ptr + to, (grad_k * scale).to(k.dtype), mask=within)
    tl.store(grad_v_ptr + to, grad_v.to(v.dtype), mask=within)


@triton.jit
def _backward_bias_kernel(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, bias_ptr: Any, rows_ptr: Any, lse_ptr: Any, grad_ptr: Any, delta_ptr: Any,
    grad_bias_ptr: Any,
    q0: Any, q1: Any, q2: Any, k0: Any, k1: Any, k2: Any, v0: Any, v1: Any, v2: Any,
    bias0: Any, bias1: Any, bias2: Any, bias3: Any, out0: Any, out1: Any, out2: Any,
    heads: Any, group: Any, queries: Any, keys: Any, batches: Any, scale: Any, limit: Any, factor: Any,
    causal: tl.constexpr, biased: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of the bias, summed over the `batches` sequences that share it, in their order: the same each time."""
    key = tl.program_id(0) * block_k + tl.arange(0, block_k)
    query = tl.program_id(1) * block_q + tl.arange(0, block_q)
    first, h = tl.program_id(2) // heads, tl.program_id(2) % heads
    found = tl.zeros([block_q, block_k], tl.float32)
    for b in range(first * batches, (first + 1) * batches):
        at, inside = (b * heads + h).to(tl.int64) * queries + query, query < queries
        rows = tl.load(rows_ptr + at, mask=inside, other=0)
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        q = _tile(q_ptr + b * q0 + h * q1, query, q2, queries, width, padded)
        grad = _tile(grad_ptr + b * out0 + h * out1, query, out2, queries, width, padded)
        k = _tile(k_ptr + b * k0 + h // group * k1, key, k2, keys, width, padded)
        v = _tile(v_ptr + b * v0 + h // group * v1, key, v2, keys, width, padded)
        _, grad_scores = _backward_tile(
            q, k, v, grad, lse, delta, rows, bias_ptr + b * bias0 + h * bias1, query, key, bias2, bias3, queries, keys,
            scale, limit, factor, causal, biased,
        )  # fmt: skip
        found += grad_scores
    within = (query < queries)[:, None] & (key < keys)[None, :]
    to = tl.program_id(2).to(tl.int64) * queries * keys + query[:, None] * keys + key[None, :]
    tl.store(grad_bias_ptr + to, found, mask=within)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    assert tensor.stride(3) == 1, tensor.stride()
    return tensor.stride()[:3]


def _like(tensor: Tensor) -> Tensor:
    """An empty tensor [B, h, Q, K] in which the heads of a position follow each other."""
    b, h, s, k = tensor.shape
    return tensor.new_empty(b, s, h, k).transpose(1, 2)


def _common(q: Tensor, k: Tensor, bias: Tensor | None, drop: float, scale: float, causal: bool) -> dict[str, Any]:
    """Arguments that all kernels take."""
    _, h, queries, width = q.shape
    return dict(
        heads=h, group=h // k.shape[1], queries=queries, keys=k.shape[2], scale=scale, limit=limit_of(drop),
        factor=1 / (1 - drop), causal=causal, biased=bias is not None, width=width,
        padded=max(16, triton.next_power_of_2(width)), block_q=QUERIES, block_k=KEYS,
    )  # fmt: skip


def _bias(bias: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The bias, and its strides as [B, h, Q, S]."""
    if bias is None:
        return q, (0, 0, 0, 0)
    return bias, bias.expand(*q.shape[:3], k.shape[2]).stride()


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, drop: float, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """[B, h, Q, K], twice [B, g, S, K], bias that broadcasts to [B, h, Q, S], rows int64 [B, h, Q] -> [B, h, Q, K] and
    the log-sum-exp of the scores, float32 [B, h, Q]."""
    out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    given, strides = _bias(bias, q, k)
    grid = (triton.cdiv(q.shape[2], QUERIES), q.shape[0] * q.shape[1])
    _forward_kernel[grid](
        q, k, v, given, rows.contiguous(), out, lse, *_strides(q), *_strides(k), *_strides(v), *strides, *_strides(out),
        **_common(q, k, bias, drop, scale, causal),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, out: Tensor, lse: Tensor,
    drop: float, scale: float, causal: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of the bias."""
    whole = _like(out)
    grad = grad if grad.stride() == whole.stride() else whole.copy_(grad)
    delta, rows = torch.empty_like(lse), rows.contiguous()
    grad_q, grad_k, grad_v = _like(q), _like(k), _like(v)
    given, strides = _bias(bias, q, k)
    b, h, queries, _ = q.shape
    of_inputs = (*_strides(q), *_strides(k), *_strides(v), *strides, *_strides(out))
    common = _common(q, k, bias, drop, scale, causal)
    grid: tuple[int, ...] = (triton.cdiv(queries, QUERIES), b * h)
    _backward_queries_kernel[grid](q, k, v, given, rows, out, lse, grad, delta, grad_q, *of_inputs, **common)
    grid = (triton.cdiv(k.shape[2], KEYS), b * k.shape[1])
    _backward_keys_kernel[grid](
        q, k, v, given, rows, lse, grad, delta, grad_k, grad_v, *of_inputs, *_strides(grad_k), **common
    )
    if bias is None or not need_bias:
        return grad_q, grad_k, grad_v, None
    sums = bias.shape[0] if bias.dim() == 4 else 1
    grad_bias = q.new_empty(sums, h, queries, k.shape[2], dtype=torch.float32)
    grid = (triton.cdiv(k.shape[2], KEYS), triton.cdiv(queries, QUERIES), sums * h)
    _backward_bias_kernel[grid](
        q, k, v, given, rows, lse, grad, delta, grad_bias, *of_inputs, batches=b // sums, **common
    )
    return grad_q, grad_k, grad_v, grad_bias.sum_to_size(bias.shape).to(bias.dtype)
