"""RMSNorm of queries and keys, before they are rotated: of each head (Qwen 3, Gemma 3), or of all heads together (OLMo
2).

B sequences, S positions, H heads, K head width; h = H/tp heads of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.learning.models.norms import rms_norm
from roots_dist.parallel.tensor.collectives import TensorParallel, sum_in_tp_region
from roots_dist.parallel.tensor.exact import by_heads
from roots_dist.world.sharding import ShardSpec, declare


class HeadNorm(nn.Module):
    """RMSNorm over the K channels of each head, with one weight [K] for all heads. Its gradient is partial, with and
    without sequence parallelism: each rank has seen its own heads only."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__()
        m = config.model
        self.tp, self.eps, self.zero_centered = tp, config.advanced.norm_eps, m.zero_centered_norm
        fill = 0.0 if m.zero_centered_norm else 1.0
        self.weight = declare(self, "weight", ShardSpec(shape=(m.width_of_head(),), fill=fill, partial=True), tp.axis)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, S, K] -> [B, h, S, K]"""

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return rms_norm(x, weight, self.eps, self.zero_centered, self.tp.fuse)

        return by_heads(self.tp, norm, x, self.weight)


class WholeNorm(nn.Module):
    """RMSNorm over all heads together, with a weight [H*K] that is sharded with the heads: the sum of squares is one
    over tensor ranks."""

    def __init__(self, config: Config, tp: TensorParallel, heads: int, parts: int):
        """parts: number of different slices of the heads; with fewer than ranks, neighbours hold the same one."""
        super().__init__()
        m = config.model
        self.tp, self.eps, self.width = tp, config.advanced.norm_eps, heads * m.width_of_head()
        self.holders, self.zero_centered = tp.size // parts, m.zero_centered_norm
        fill = 0.0 if m.zero_centered_norm else 1.0
        spec = ShardSpec(shape=(self.width,), shard_dim=0, shards=parts, fill=fill, partial=parts < tp.size)
        self.weight = declare(self, "weight", spec, tp.axis)


def norm_together(norms: tuple[WholeNorm, ...], xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[B, S, h*K] each -> the same shapes: several whole norms, with one message for all of their sums."""
    tp = norms[0].tp
    exact = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]
    squares = [x.square().sum(-1) / n.holders for n, x in zip(norms, exact)]  # a slice counts once, whoever holds it
    total = sum_in_tp_region(torch.stack(squares, -1), tp)  # [B, S, len(norms)]
    means = [total[..., i : i + 1] / n.width for i, n in enumerate(norms)]
    scales = [n.weight.to(x.dtype) + n.zero_centered for n, x in zip(norms, exact)]  # weight, or 1 + weight
    return tuple(
        (x * torch.rsqrt(mean + n.eps) * scale).to(like.dtype)
        for n, x, mean, scale, like in zip(norms, exact, means, scales, xs)
    )
