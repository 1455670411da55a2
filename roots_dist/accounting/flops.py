"""Model FLOPs utilization: what share of the devices' peak the model's own arithmetic is (Chowdhery et al. 2022, PaLM).

learning/models/flops.py: FLOPs of a step + seconds + peak --mfu--> util/mfu_fraction
"""

from __future__ import annotations

CONVENTION = "model FLOPs, causal attention counted half"
"""What is counted: what a causal model computes at all, backward as twice forward. Recomputation is not."""


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """The share of the peak of all devices that these FLOPs in this time are; a fraction, not per cent."""
    return flops / (seconds * peak_flops)
