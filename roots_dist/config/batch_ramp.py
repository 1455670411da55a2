"""The number of sequences in each step, and in all steps before it: pure functions of the config.

Used by learning/data/batches.py, the trainer and the planner. The batch grows in stages; each stage is whole steps of
one size, so the step and the number of samples before it determine each other, and no counter has to be saved.
"""

from __future__ import annotations

from typing import NamedTuple

from roots_dist.config.sections import TrainConfig


class RampStage(NamedTuple):
    """Steps from `first_step` on take `batch` sequences each; `first_sample` were taken before."""

    first_step: int
    first_sample: int
    batch: int


def stages(train: TrainConfig) -> list[RampStage]:
    """Divide a run into stages of one batch size each.

    A ramp goes from start to global_batch by increment, each size for an equal share of the ramp's samples. A
    size is left at the first step that begins at or after the end of its share (as Megatron's ramp does).
    """
    if train.batch_ramp is None:
        return [RampStage(0, 0, train.global_batch)]
    start, increment, samples = train.batch_ramp
    sizes = [*range(start, train.global_batch, increment), train.global_batch]
    found = [RampStage(0, 0, sizes[0])]
    for i, size in enumerate(sizes[1:], 1):
        last = found[-1]
        end = -(-samples * i // (len(sizes) - 1))
        steps = max(0, -(-(end - last.first_sample) // last.batch))
        found.append(RampStage(last.first_step + steps, last.first_sample + steps * last.batch, size))
    return found


def _stage_at(train: TrainConfig, step: int) -> RampStage:
    """The last one that has begun: a large batch may pass over the whole share of the next size."""
    return [stage for stage in stages(train) if stage.first_step <= step][-1]


def batch_size_at(train: TrainConfig, step: int) -> int:
    """Sequences over the whole world in this step (steps count from 0)."""
    return _stage_at(train, step).batch


def samples_before(train: TrainConfig, step: int) -> int:
    """Sequences taken by all earlier steps: the number of this step's first sample."""
    stage = _stage_at(train, step)
    return stage.first_sample + (step - stage.first_step) * stage.batch


def step_after(train: TrainConfig, samples: int) -> int:
    """The first step that begins when so many sequences have been taken."""
    stage = [stage for stage in stages(train) if stage.first_sample <= samples][-1]
    return stage.first_step + -(-(samples - stage.first_sample) // stage.batch)


def batch_sizes(train: TrainConfig) -> list[int]:
    """Every size that occurs; each must be a multiple of micro_batch × dp. The ramp does not know dp, so that the
    samples of a step are the same in every layout."""
    return sorted({stage.batch for stage in stages(train)})
