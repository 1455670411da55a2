"""Model FLOPs by arithmetic, for MFU and the planner, in the three conventions that published figures use.

    accounting/sizes.py: what a sample goes through --flops_per_step--> MFU

Backward is twice forward. The conventions differ in how they count attention and recomputation:

    causal     causal attention half: what is computed at all; what this package reports
    full       every position sees every other (Korthikanti et al. 2022, PaLM)
    hardware   full, and what recomputation computes again (Narayanan et al. 2021, BLOOM's logs)
"""

from __future__ import annotations

from typing import Literal

from roots_dist.accounting.sizes import Part, parts
from roots_dist.config.schema import Config

Convention = Literal["causal", "full", "hardware"]
CONVENTIONS: dict[Convention, str] = {
    "causal": "model FLOPs, causal attention counted half",
    "full": "model FLOPs, attention counted in full",
    "hardware": "hardware FLOPs, attention in full, recomputation counted",
}


def flops_per_sample(config: Config, convention: Convention = "causal") -> float:
    """Forward and backward of one sample of `data.seq_length` (of two stacks: and its targets)."""

    def of(part: Part) -> float:
        scores = part.scores / (2 if part.causal and convention == "causal" else 1)
        again = 0.0
        if convention == "hardware" and part.is_block:
            again = {"none": 0.0, "selective": scores, "full": part.dense + scores}[config.train.recompute]
        return part.count * (3 * (part.dense + scores) + again)

    return sum(map(of, parts(config)))


def flops_per_step(config: Config, sequences: int | None = None, convention: Convention = "causal") -> float:
    """Of all ranks together, for a step of `sequences` sequences (default: the full batch)."""
    return (sequences or config.train.global_batch) * flops_per_sample(config, convention)


def mfu(flops: float, seconds: float, peak_flops: float, devices: int) -> float:
    """The share of the devices' peak that these FLOPs in this time are; a fraction, not per cent."""
    return flops / (seconds * peak_flops * devices)
