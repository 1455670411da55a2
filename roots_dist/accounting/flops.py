"""Model FLOPs utilization: the model's own arithmetic as a fraction of the devices' peak (Chowdhery et al. 2022, PaLM).

learning/models/flops.py: FLOPs of a step + seconds + peak --mfu--> util/mfu_fraction
"""

from __future__ import annotations

CONVENTION = "model FLOPs, causal attention counted half"
"""Convention by which FLOPs are counted: only what a causal model must compute, backward as twice forward, no
recomputation."""


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """Fraction (not per cent) of the devices' peak that `flops` in `seconds` are."""
    return flops / (seconds * peak_flops)
