"""Model FLOPs of a sample and of a step: the sum of what the pieces cost.

    pieces_of(config): PieceSpec.cost, forward, matrix products --> flops_per_sample, flops_per_step --> MFU, bounds

The same costs balance the pipeline's stages. Causal attention counts half; padded words are never multiplied.
"""

from __future__ import annotations

from roots_dist.config.schema import Config
from roots_dist.learning.models import pieces_of
from roots_dist.parallel.tensor.collectives import TensorParallel


def flops_per_sample(config: Config) -> float:
    """Forward and backward FLOPs of one sample of `data.seq_length` (two stacks: and of its targets). Backward counts
    twice forward."""
    return 3 * sum(spec.cost for spec in pieces_of(config, TensorParallel()))


def flops_per_step(config: Config, sequences: int | None = None) -> float:
    """All ranks together, for a step of `sequences` sequences (default: the full batch)."""
    return (sequences or config.train.global_batch) * flops_per_sample(config)
