"""Random numbers that no layout can change: every number is a function of a key and an index, never of a stream.

Initial weights are keyed on (seed, parameter name) and indexed by row and column of the global tensor; dropout masks
are keyed on (seed, step, layer, site) and indexed by sample, position and channel. A rank computes only the numbers it
needs, on any device, and recomputation reproduces the mask because the key is the same. There is no state to save or
restore.

The generator is a hash in counter mode (Salmon et al. 2011): splitmix64 (Steele et al. 2014) turns a key and a row into
64 bits; two rounds of the 32-bit finalizer `lowbias32` (Wellons 2018) turn those and a column into 32 bits.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from roots_dist.world.fuse import Fuse, eager

CACHED = 1 << 17
"""Entries whose hashes a CPU computes at one time."""


def key(*parts: int | str) -> int:
    """Hash names and numbers to 64 bits (a signed int), identically on every machine."""
    text = "\x00".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _wrap(value: int) -> int:
    """A 64-bit constant as the signed number that torch.int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA, _MIX1, _MIX2 = _wrap(0x9E3779B97F4A7C15), _wrap(0xBF58476D1CE4E5B9), _wrap(0x94D049BB133111EB)


def _shift64(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def fold(state: int | Tensor, index: Tensor) -> Tensor:
    """Derive a 64-bit key for each index, from one key or one per index (broadcast). One step of splitmix64."""
    if (kernels := kernels_of(index.device)) is not None:
        return kernels.fold(state, index)
    x = index.to(torch.int64) * _GAMMA + state
    x = (x ^ _shift64(x, 30)) * _MIX1
    x = (x ^ _shift64(x, 27)) * _MIX2
    return x ^ _shift64(x, 31)


def _xorshift(x: Tensor, shift: int) -> Tensor:
    """x ^ x >> shift, on int32; the mask makes the shift logical."""
    return x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))


def _xorshift_(x: Tensor, shift: int, shifted: Tensor) -> None:
    """The same in place. shifted: memory of x's size."""
    x ^= torch.bitwise_right_shift(x, shift, out=shifted).bitwise_and_((1 << (32 - shift)) - 1)


def _unfinished_bits(rows: Tensor, columns: Tensor) -> Tensor:
    """Compute `bits` without its last xorshift. lowbias32 is a xorshift by 16, a product, one by 15, a product, one by
    16; products wrap. The first xorshift of row ^ column is the XOR of the xorshifts of both."""
    low, high = rows.to(torch.int32), (rows >> 32).to(torch.int32)
    shape = (*rows.shape, *(1,) * columns.dim())
    x = _xorshift(low, 16).reshape(shape) ^ _xorshift(columns.to(torch.int32), 16)
    shifted = torch.empty_like(x)
    for last in (False, True):
        if last:
            x += high.reshape(shape)
            _xorshift_(x, 16, shifted)
        x *= 0x7FEB352D
        _xorshift_(x, 15, shifted)
        x *= 0x846CA68B - (1 << 32)
        if not last:
            _xorshift_(x, 16, shifted)
    return x


def bits(rows: Tensor, columns: Tensor) -> Tensor:
    """int32 [*rows.shape, *columns.shape]: 32 random bits for each pair of a row key (int64) and a column (int32)."""
    x = _unfinished_bits(rows, columns)
    _xorshift_(x, 16, torch.empty_like(x))
    return x


def keep(rows: Tensor, columns: Tensor, drop: float) -> Tensor:
    """bool [*rows.shape, *columns.shape]: False with probability `drop`."""
    return _reach(_unfinished_bits(rows, columns), limit_of(drop))


def _reach(x: Tensor, limit: int) -> Tensor:
    """True where finished bits are at least the limit; x are the bits before the last xorshift. It leaves their upper
    half as it is and XORs it into the lower half, which matters only where the upper half equals the limit's: there the
    limit's upper half stands for it."""
    return (x ^ ((limit >> 16) & 0xFFFF)) >= limit


def whole_mask(rows: Tensor, limit: int, columns: int, first_column: int = 0) -> Tensor:
    """bool [*rows.shape, columns]: what dropout keeps, with a limit from limit_of; to be compiled to a part of a kernel
    that keeps none of it in memory."""
    numbers = torch.arange(columns, dtype=torch.int32, device=rows.device) + first_column
    return _reach(_unfinished_bits(rows, numbers), limit)


def mask(rows: Tensor, drop: float, columns: int) -> Tensor:
    """bool [*rows.shape, columns]: what dropout keeps of a tensor of this shape."""
    out = torch.empty(rows.numel(), columns, dtype=torch.bool, device=rows.device)
    numbers = torch.arange(columns, dtype=torch.int32, device=rows.device)
    size = max(1, CACHED // max(1, columns))
    for keys, part in zip(rows.reshape(-1).split(size), out.split(size)):
        part.copy_(keep(keys, numbers, drop))
    return out.view(*rows.shape, columns)


def limit_of(drop: float) -> int:
    """The least of the 32-bit numbers that are kept: a share of `drop` is below it."""
    return round(drop * 2**32) - 2**31


def dropout(x: Tensor, drop: float, rows: Tensor, first_column: int = 0, fuse: Fuse = eager) -> Tensor:
    """Inverted dropout of x [*rows.shape, channels]; channels are numbered from `first_column`. Backward computes the
    mask again from the keys: nothing of x's size is kept."""
    out: Tensor = _Dropout.apply(  # type: ignore[no-untyped-call] # torch types no apply
        x, drop, rows, first_column, fuse
    )
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: float, rows: Tensor, first_column: int, fuse: Fuse) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.told = drop, first_column, fuse
        return _dropped(x, rows, drop, first_column, fuse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return _dropped(grad, rows, *ctx.told), None, None, None, None


def _dropped(x: Tensor, rows: Tensor, drop: float, first_column: int, fuse: Fuse) -> Tensor:
    """Drop entries of x: in one kernel on a GPU or when compiled; otherwise a few rows at a time, so that their hashes
    stay in the CPU's cache."""
    kernels = kernels_of(x.device)
    if kernels is not None and x.dtype != torch.float64:  # a kernel computes in float32
        return kernels.dropout(x, drop, rows, first_column)
    if fuse is not eager:
        return fuse(_wholly_dropped)(x, rows, limit_of(drop), 1 / (1 - drop), first_column)
    columns = torch.arange(first_column, first_column + x.shape[-1], dtype=torch.int32, device=x.device)
    flat, keys = x.reshape(-1, x.shape[-1]), rows.reshape(-1)
    out = torch.empty_like(flat)
    size = max(1, CACHED // max(1, x.shape[-1]) if x.device.type == "cpu" else len(keys))
    for part in (slice(i, i + size) for i in range(0, len(keys), size)):
        # the factor stays a Python number: in bf16 it would be 0.2 % too small
        torch.mul(flat[part], 1 / (1 - drop), out=out[part]).masked_fill_(~keep(keys[part], columns, drop), 0.0)
    return out.view(x.shape)


def _wholly_dropped(x: Tensor, rows: Tensor, limit: int, factor: float, first_column: int) -> Tensor:
    return torch.where(whole_mask(rows, limit, x.shape[-1], first_column), x * factor, 0.0)


class Kernels(Protocol):
    """Functions that a device computes in one launch each."""

    def fold(self, state: int | Tensor, index: Tensor) -> Tensor: ...

    def dropout(self, x: Tensor, drop: float, rows: Tensor, first_column: int) -> Tensor: ...


class CountedKernels:
    """Stand for the kernels where tensors have no numbers: one operation for each."""

    def fold(self, state: int | Tensor, index: Tensor) -> Tensor:
        return index + state

    def dropout(self, x: Tensor, drop: float, rows: Tensor, first_column: int) -> Tensor:
        return x * (1 / (1 - drop))


def kernels_of(device: torch.device) -> Kernels | None:
    """The kernels of a device; None on a CPU, which has none. The one place where it is chosen how masks are made."""
    if device.type == "cpu":
        return None
    if device.type == "meta":
        return CountedKernels()
    from roots_dist.world import rng_triton

    return cast("Kernels", rng_triton)


def normal_(out: Tensor, name_key: int, rows: range, columns: range, std: float) -> Tensor:
    """Fill out [rows, columns] with N(0, std²): each entry of the global matrix gets the same number in every slice.

    Drawn in float32 (Box-Muller: radius from one hash, angle from another) and rounded to out's dtype.
    """
    assert out.shape == (len(rows), len(columns)), (out.shape, rows, columns)
    wide = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=out.device)
    block = max(1, (1 << 22) // max(1, len(columns)))  # 4M numbers at a time: the hash needs a few times their memory
    for start in range(0, len(rows), block):
        index = torch.arange(rows.start + start, rows.start + min(start + block, len(rows)), device=out.device)
        radius, angle = (
            bits(fold(fold(name_key, index), torch.tensor(part, device=out.device)), wide).float().add_(2.0**31)
            for part in (0, 1)
        )  # each uniform in [0, 2³²]
        radius.add_(0.5).mul_(2.0**-32).clamp_(2.0**-33, 1.0).log_().mul_(-2).sqrt_()
        out[start : start + block] = radius.mul_(angle.mul_(2 * math.pi * 2.0**-32).cos_()).mul_(std)
    return out
