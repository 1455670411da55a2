"""The hash of rng.py as Triton kernels: a dropout is one launch, which reads and writes each entry once, and a fold of
keys another.

Imported only where a GPU is used. Numbers are those of rng.py, to the bit; tests run both in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lowbias32(x: Any) -> Any:
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash_bits(row: Any, column: Any) -> Any:
    """32 random bits, int32, for a row key (int64) and a column, as rng.bits."""
    low = _lowbias32(row.to(tl.uint32) ^ column.to(tl.uint32))
    return _lowbias32(low + (row >> 32).to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def _dropout_kernel(
    x_ptr: Any,
    out_ptr: Any,
    rows_ptr: Any,
    columns: Any,
    first_column: Any,
    limit: Any,
    factor: Any,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    key = tl.load(rows_ptr + row)
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    kept = (x.to(tl.float32) * factor).to(x.dtype)
    dropped = hash_bits(key, column + first_column) < limit
    tl.store(out_ptr + row * columns + column, tl.where(dropped, 0.0, kept), mask=inside)


@triton.jit(do_not_specialize=["number"])
def _fold_kernel(
    state_ptr: Any,
    number: Any,
    index_ptr: Any,
    out_ptr: Any,
    count: Any,
    size1: Any,
    size2: Any,
    state0: Any,
    state1: Any,
    state2: Any,
    index0: Any,
    index1: Any,
    index2: Any,
    of_number: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    i2, i1, i0 = at % size2, at // size2 % size1, at // size2 // size1
    x = tl.load(index_ptr + i0 * index0 + i1 * index1 + i2 * index2, mask=inside, other=0).to(tl.uint64)
    x *= 0x9E3779B97F4A7C15
    if of_number:
        x += number.to(tl.uint64)
    else:
        x += tl.load(state_ptr + i0 * state0 + i1 * state1 + i2 * state2, mask=inside, other=0).to(tl.uint64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    tl.store(out_ptr + at, (x ^ (x >> 31)).to(tl.int64), mask=inside)


def fold(state: int | Tensor, index: Tensor) -> Tensor:
    """Compute rng.fold in a kernel, for at most three dimensions. A new number does not compile a new kernel."""
    index = index.to(torch.int64)
    states = state if isinstance(state, Tensor) else index
    shape = torch.broadcast_shapes(states.shape, index.shape)
    whole = (1,) * (3 - len(shape)) + tuple(shape)
    states, indices = states.expand(whole), index.expand(whole)
    out = torch.empty(shape, dtype=torch.int64, device=index.device)
    number = 0 if isinstance(state, Tensor) else state
    _fold_kernel[(triton.cdiv(out.numel(), 256),)](
        states,
        number,
        indices,
        out,
        out.numel(),
        *whole[1:],
        *states.stride(),
        *indices.stride(),
        of_number=not isinstance(state, Tensor),
        block=256,
    )
    return out


def dropout(x: Tensor, drop: float, rows: Tensor, first_column: int) -> Tensor:
    """Compute rng.dropout in a kernel, in float32 or narrower. x [*rows.shape, channels]."""
    flat = x.contiguous()
    out, columns = torch.empty_like(flat), x.shape[-1]
    block = min(1024, triton.next_power_of_2(columns))
    grid = (rows.numel(), triton.cdiv(columns, block))
    limit, factor = round(drop * 2**32) - 2**31, 1 / (1 - drop)
    _dropout_kernel[grid](flat, out, rows.contiguous(), columns, first_column, limit, factor, block=block)
    return out
