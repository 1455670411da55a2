"""The learning rate as a pure function of the step: warm-up, then one of four shapes. No torch.

    runs/train/step.py: engine.step(lr=rate(step)), with step counted from 0

Nothing to save and nothing to count: resume and data-parallel size cannot change it. No step has rate 0: warm-up ends
at the full rate on its last step, and decay begins on the step after with the full rate and would reach `min_lr` on
the step after its last (transformers starts with a step of rate 0 instead).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from roots_dist.config.schema import Optim


def _stay(progress: float) -> float:
    return 1.0


def _straight(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    """Loshchilov & Hutter 2017, without restarts."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": _stay,
    "cosine": _cosine,
    "linear": _straight,
    "wsd": _straight,  # warm-up, stable, decay (Hu et al. 2024); a straight decay, as Hägele et al. 2024 compare it
}


def rate(optim: Optim, steps: int) -> Callable[[int], float]:
    """The learning rate of each step of a run of `steps` steps. From (warm-up, decay) to `min_lr`, which then stays."""
    shape = SHAPES[optim.lr_schedule]
    if optim.lr_schedule == "wsd":
        decay = optim.decay_steps or max(1, round(0.2 * steps))
        begin = max(optim.warmup_steps, steps - decay)
    else:
        begin = optim.warmup_steps
        decay = optim.decay_steps or max(1, steps - begin)

    def at(step: int) -> float:
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        progress = min(max(step - begin, 0) / decay, 1.0)
        return optim.min_lr + (optim.lr - optim.min_lr) * shape(progress)

    return at
