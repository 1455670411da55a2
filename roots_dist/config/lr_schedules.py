"""The learning rate as a pure function of the step: warm-up, then one of a table of schedules. No torch.

    optim.lr_schedule --LR_SCHEDULES--> rate(step) --runs/train/step.py--> engine.step(lr), with step counted from 0

Nothing to save and nothing to count: resume and data-parallel size cannot change it. No step has rate 0: warm-up ends
at the full rate on its last step, and decay begins on the step after with the full rate and would reach `min_lr` on
the step after its last (transformers starts with a step of rate 0 instead).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class ScheduleSettings(Protocol):
    """The keys of `optim` in config/schema.py that a schedule may read; the section imports this table."""

    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def lr_schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_steps(self) -> int | None: ...


Rate = Callable[[int], float]
"""The learning rate of a step."""


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """All that is known of one schedule of the learning rate."""

    after_warmup: Callable[[ScheduleSettings, int], Rate]
    """A function of `optim` and the run's steps: the rate of each step that follows the warm-up."""
    reads: frozenset[str] = frozenset()
    """Keys of optim that it reads beside lr and warmup_steps. A key that it does not read is refused."""
    decays_at_the_end: bool = False
    """True if optim.decay_steps are the last steps of the run, not the first after the warm-up."""


def lr_schedule(optim: ScheduleSettings, steps: int, schedule: LrSchedule | None = None) -> Rate:
    """The learning rate of each step of a run of `steps` steps. `schedule` is one that is not in the table."""
    after_warmup = (schedule or LR_SCHEDULES[optim.lr_schedule]).after_warmup(optim, steps)

    def at(step: int) -> float:
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        return after_warmup(step)

    return at


def _constant(optim: ScheduleSettings, steps: int) -> Rate:
    return lambda step: optim.lr


def _cosine(optim: ScheduleSettings, steps: int) -> Rate:
    """Loshchilov & Hutter 2017, without restarts."""
    return _decay(optim, *_from_warmup(optim, steps), lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)))


def _linear(optim: ScheduleSettings, steps: int) -> Rate:
    return _decay(optim, *_from_warmup(optim, steps), lambda progress: 1.0 - progress)


def _wsd(optim: ScheduleSettings, steps: int) -> Rate:
    """Warm-up, stable, decay (Hu et al. 2024); a straight decay, as Hägele et al. 2024 compare it."""
    length = optim.decay_steps or max(1, round(0.2 * steps))
    return _decay(optim, max(optim.warmup_steps, steps - length), length, lambda progress: 1.0 - progress)


def _from_warmup(optim: ScheduleSettings, steps: int) -> tuple[int, int]:
    """The first step of a decay that follows the warm-up, and its length."""
    return optim.warmup_steps, optim.decay_steps or max(1, steps - optim.warmup_steps)


def _decay(optim: ScheduleSettings, begin: int, length: int, shape: Callable[[float], float]) -> Rate:
    """Decay from lr to min_lr, which then stays. shape: progress from 0 to 1 -> share of the way that is left."""

    def at(step: int) -> float:
        return optim.min_lr + (optim.lr - optim.min_lr) * shape(min(max(step - begin, 0) / length, 1.0))

    return at


_DECAY = frozenset({"min_lr", "decay_steps"})
LR_SCHEDULES = {
    "constant": LrSchedule(after_warmup=_constant),
    "cosine": LrSchedule(after_warmup=_cosine, reads=_DECAY),
    "linear": LrSchedule(after_warmup=_linear, reads=_DECAY),
    "wsd": LrSchedule(after_warmup=_wsd, reads=_DECAY, decays_at_the_end=True),
}
"""The values of `optim.lr_schedule`."""
