"""Norms and dropout, which lie outside the tensor-parallel regions and see all channels of this rank's positions.

B sequences, s positions of this rank, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch
from roots_dist.world.sharding import ShardSpec, declare


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019). Its gradient is partial under sequence
    parallelism."""

    def __init__(self, config: Config, tp: TensorParallel, width: int | None = None, copy_of: str | None = None):
        """width: by default that of the stack. copy_of: global name of the norm that this one copies."""
        super().__init__()
        self.eps = config.advanced.norm_eps

        def vector(name: str, fill: float) -> nn.Parameter:
            original = f"{copy_of}.{name}" if copy_of else None
            shape = (width or config.model.hidden,)
            spec = ShardSpec(shape=shape, fill=fill, partial=tp.sequence_parallel, copy_of=original)
            return declare(self, name, spec, tp.axis)

        self.weight = vector("weight", 1.0)
        self.bias = vector("bias", 0.0) if config.model.norm == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Dropout(nn.Module):
    """Inverted dropout whose mask depends on (seed, step, site, sample, position, channel) and on no layout."""

    def __init__(self, config: Config, tp: TensorParallel, site: str):
        super().__init__()
        self.drop, self.seed, self.tp, self.site = config.model.dropout, config.train.seed, tp, site

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        if not self.training or self.drop == 0:
            return x
        mine = self.tp.held_positions(x.shape[1])
        return rng.dropout(x, self.drop, mask_rows(self.seed, self.site, batch, mine, x.device))


def mask_rows(seed: int, site: str, batch: MicroBatch, positions: range, device: torch.device) -> Tensor:
    """int64 [B, s]: key of each row of a dropout mask."""
    places = torch.arange(positions.start, positions.stop, device=device)
    samples = rng.fold(rng.key("dropout", seed, batch.step, site), batch.sample_ids)  # [B]
    return rng.fold(samples.unsqueeze(1), places)
