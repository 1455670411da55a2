"""Bytes that a rank holds between two steps, by arithmetic: weights, gradients, master weights and moments."""

from __future__ import annotations

from roots_dist.accounting.sizes import parameters
from roots_dist.config.schema import Config
from roots_dist.layout import Layout

GIB = 2**30


def state_bytes(config: Config, layout: Layout) -> int:
    """What a rank holds between two steps at least: weights, gradients, master weights and both moments.

    A lower bound (no activations, no buffers, the parts shared out evenly), so that what it refuses cannot run.
    """
    mine = parameters(config) // (layout.tp * layout.pp)
    model_bytes = 8 if config.advanced.float64 else 2 if config.train.precision == "bf16" else 4
    wide = 8 if config.advanced.float64 else 4
    states = (2 if model_bytes == wide else 3) * wide  # full precision needs no separate master weights
    zero = config.parallel.zero_stage
    shared = states + (model_bytes if zero >= 2 else 0) + (model_bytes if zero >= 3 else 0)
    whole = 2 * model_bytes + states - shared
    return mine * whole + mine * shared // (layout.dp if zero else 1)
