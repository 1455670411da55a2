"""Lower bounds of a run by arithmetic: seconds per step and bytes per process, shown beside what is measured.

    config + layout + peak of the devices --bounds--> banner, plan/* metrics, origin.json

These are bounds, not estimates: a faster step or a smaller process would be an error of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from roots_dist.accounting.memory import GIB, state_bytes
from roots_dist.config.records import schedule_of
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.schedule.schedules import expected_bubble


@dataclass(frozen=True)
class Bounds:
    step_s: float | None
    """Seconds per step; None if the peak of the devices is unknown."""
    memory_gib: float
    """GiB of each process: an even share of weights, gradients and optimizer states, without activations."""

    def metrics(self) -> dict[str, float]:
        return {"plan/memory_gib": self.memory_gib, **({} if self.step_s is None else {"plan/step_s": self.step_s})}

    def facts(self) -> Mapping[str, float | None]:
        return {"least_step_s": self.step_s, "least_memory_gib": self.memory_gib}


def bounds(config: Config, layout: Layout, step_flops: float, peak_flops: float | None) -> Bounds:
    """step_flops: model FLOPs of a full step, after any batch ramp (learning/models/flops.py). peak_flops: FLOP/s
    of all devices together.

    Time is the model FLOPs at that peak plus the bubble that the schedule leaves with equal stages (Narayanan et al.
    2021, section 2.2). If only a part of the model is trained, only the forward pass and the weights are certain, so
    only they count.
    """
    whole = config.finetune.strategy == "full"
    held = state_bytes(config, layout, all_learns=whole)
    if peak_flops is None:
        return Bounds(None, held / GIB)
    parallel = config.parallel
    bubble = expected_bubble(
        schedule_of(config), layout.pp, config.num_microbatches(layout.dp), parallel.virtual_stages
    )
    flops = step_flops / (1 if whole else 3)
    return Bounds(flops / peak_flops * (1 + (bubble or 0.0)), held / GIB)
