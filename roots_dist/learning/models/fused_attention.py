"""Attention by fused kernels, tile by tile (tiles.py), without scores or a mask of queries × keys in memory.

    one tile without a band     one call of PyTorch's scaled_dot_product_attention
    borders, windows            CUDA in half precision, where OF_LENGTHS allows it: one call of its kernel for sequences
                                of several lengths
    else on a CPU               its fused kernel for each part of each tile; two parts of a tile are merged by their
                                log-sum-exp (Dao 2023, section 3.1). Between forward and backward q, k, v and the output
                                are kept, and 1 number for each query
    else                        scaled_dot_product_attention for each tile

B sequences, h query heads, g key/value heads, Q queries, S keys, K head width. Queries and keys are ranges of global
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roots_dist.errors import present
from roots_dist.learning.models.tiles import Edge, Part, Pattern, Tile


class Limits(NamedTuple):
    """The limits of a kernel's input."""

    dtypes: tuple[torch.dtype, ...]
    capability: tuple[int, int]
    """The least compute capability of a GPU."""
    multiple: int
    """Head widths are multiples of this."""
    width: int
    """The widest heads, forward and backward."""
    wide: int
    """The same on the GPUs of `wide_on`."""
    wide_on: tuple[tuple[int, int], ...]
    """Compute capabilities."""

    def take(self, dtype: torch.dtype, width: int, capability: tuple[int, int]) -> bool:
        """True if the kernel computes heads of this dtype and width on a GPU of this compute capability."""
        widest = self.wide if capability in self.wide_on else self.width
        known = dtype in self.dtypes and capability >= self.capability
        return known and width <= widest and width % self.multiple == 0


OF_LENGTHS = Limits((torch.bfloat16, torch.float16), (8, 0), 8, 192, 256, ((8, 0), (9, 0), (10, 0)))
"""PyTorch's kernel for sequences of several lengths (the checks of sdp_utils.cpp and flash_api.cpp, where it has the
least that all of its GPUs take)."""
BLOCKS = {"cpu": 128, "meta": 128}
"""Device -> queries of a tile with a band: few, because a tile computes its edges in full."""
BLOCK = 1024
"""Queries of such a tile on all other devices, where a call costs more."""


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float,
    make_band: Callable[[int, int], Tensor] | None = None,
) -> Tensor:
    """[B, h, Q, K], twice [B, g, S, K] -> [B, h, Q, K].

    make_band: the bias [1, 1 or h, n, m] of n queries and m keys of which the last ones are the same position, in the
    dtype of q; needed if the pattern has a window or is biased.
    """
    block = BLOCKS.get(q.device.type, BLOCK)
    tiles = pattern.tiles(block)
    longest = [len(part.keys) for tile in tiles for part in tile.parts if part.edge is Edge.BAND]
    if not longest and len(tiles) == 1 and (len(tiles[0].parts) == 1 or q.device.type == "cuda"):
        return _sdpa(q, k, v, tiles[0], pattern, scale, None)
    if q.device.type == "cuda" and not pattern.biased:
        capability = torch.cuda.get_device_capability(q.device)
        if OF_LENGTHS.take(q.dtype, q.shape[3], capability):
            return _of_lengths(q, k, v, pattern, scale)
    band = present(make_band)(min(block, len(pattern.queries)), max(longest)) if longest else None
    if q.device.type in ("cpu", "meta"):
        out: Tensor = _Tiled.apply(q, k, v, pattern, tiles, scale, band)  # type: ignore[no-untyped-call] # torch's apply
        return out
    found = [(tile.rows.start, _sdpa(q, k, v, tile, pattern, scale, band)) for tile in tiles]
    rows = dict.fromkeys(row for row, _ in found)
    return torch.cat([torch.cat([y for row, y in found if row == wanted], 2) for wanted in rows])


def _at(positions: range, whole: range) -> slice:
    return slice(positions.start - whole.start, positions.stop - whole.start)


def _lower_right(band: Tensor | None, queries: range, part: Part) -> Tensor | None:
    """The bias of a part: rows and columns are counted from the last query and the last key."""
    if part.edge is not Edge.BAND:
        return None
    band = present(band)
    return band[..., band.shape[-2] - len(queries) :, band.shape[-1] - len(part.keys) :]


class _Tiled(torch.autograd.Function):
    """The CPU's fused kernel. Each part's backward takes the output and log-sum-exp of its whole tile."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        tiles: Sequence[Tile],
        scale: float,
        band: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for tile in tiles:
            mine = _at(tile.queries, pattern.queries)
            found = [
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[tile.rows, :, mine],
                    k[tile.rows, :, _at(part.keys, pattern.keys)],
                    v[tile.rows, :, _at(part.keys, pattern.keys)],
                    0.0,
                    part.edge is Edge.CAUSAL,
                    attn_mask=_lower_right(band, tile.queries, part),
                    scale=scale,
                )
                for part in tile.parts
            ]
            mixed, merged = found[0]
            for more, more_lse in found[1:]:
                both = torch.logaddexp(merged, more_lse)  # [B, h, Q], as wide as the kernel adds
                mixed = mixed * (merged - both).exp().unsqueeze(-1) + more * (more_lse - both).exp().unsqueeze(-1)
                merged = both
            out[tile.rows, :, mine] = mixed
            lse[tile.rows, :, mine] = merged
        ctx.tiling = pattern, tiles, scale, band
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        pattern, tiles, scale, band = ctx.tiling
        wide = torch.promote_types(q.dtype, torch.float32)  # sums of many tiles
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (torch.zeros_like(t, dtype=wide) for t in (k, v))
        for tile in tiles:
            mine = (tile.rows, slice(None), _at(tile.queries, pattern.queries))
            for part in tile.parts:
                seen = (tile.rows, slice(None), _at(part.keys, pattern.keys))
                part_q, part_k, part_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad[mine],
                    q[mine],
                    k[seen],
                    v[seen],
                    out[mine],
                    lse[mine],
                    0.0,
                    part.edge is Edge.CAUSAL,
                    attn_mask=_lower_right(band, tile.queries, part),
                    scale=scale,
                )
                grad_q[mine] += part_q
                grad_k[seen] += part_k
                grad_v[seen] += part_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, tile: Tile, pattern: Pattern, scale: float, band: Tensor | None) -> Tensor:
    """One tile in one call: two parts are a causal range of queries after other keys."""
    seen = range(tile.parts[0].keys.start, tile.parts[-1].keys.stop)
    mine, at = _at(tile.queries, pattern.queries), _at(seen, pattern.keys)
    bias: Any = _lower_right(band, tile.queries, tile.parts[0])
    if len(tile.parts) > 1:
        from torch.nn.attention.bias import causal_lower_right  # brings torch._dynamo, which takes seconds

        bias = causal_lower_right(len(tile.queries), len(seen))  # the fused kernels know this one
    return F.scaled_dot_product_attention(
        q[tile.rows, :, mine],
        k[tile.rows, :, at],
        v[tile.rows, :, at],
        attn_mask=bias,
        is_causal=bias is None and tile.parts[0].edge is Edge.CAUSAL,
        enable_gqa=q.shape[1] != k.shape[1],
        scale=scale,
    )


def _of_lengths(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """Documents one after another, as CUDA's kernel takes them: [T, h, K], and where each begins. Where queries are
    fewer than keys, it puts the last query at the last key."""
    from torch.nn.attention.varlen import varlen_attn

    pairs = [(row, *pair) for row in range(q.shape[0]) for pair in pattern.pairs(row if pattern.documents else 0)]
    sizes = [(len(queries), len(keys)) for _, queries, keys in pairs]
    if sum(size for _, size in sizes) == k.shape[0] * k.shape[2]:
        packed_k, packed_v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
    else:  # no document's keys but those of the queries
        at = [(row, _at(keys, pattern.keys)) for row, _, keys in pairs]
        packed_k, packed_v = (torch.cat([t[row, :, keys].transpose(0, 1) for row, keys in at]) for t in (k, v))
    starts = torch.tensor([(0, 0), *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32).t().contiguous()
    if q.device.type == "cuda":
        starts = starts.pin_memory().to(q.device, non_blocking=True)
    before = -1 if pattern.window is None else pattern.window - 1
    y: Any = varlen_attn(
        q.transpose(1, 2).flatten(0, 1),
        packed_k,
        packed_v,
        starts[0],
        starts[1],
        max(size for size, _ in sizes),
        max(size for _, size in sizes),
        scale=scale,
        window_size=(before, 0 if pattern.causal else -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    mixed: Tensor = y.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    return mixed
