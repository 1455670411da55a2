"""One optimizer step, top to bottom. Every rank calls it; the report is the same on all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from roots_dist.errors import NotFiniteError
from roots_dist.objectives import OBJECTIVES
from roots_dist.objectives.base import MicroBatch
from roots_dist.sharding import sum_partial_gradients, sum_tied_gradients
from roots_dist.train.build import Run
from roots_dist.train.finite import Trouble, agree


@dataclass(frozen=True)
class StepReport:
    loss: float
    """What was differentiated: Σ over all terms of weight · sum / count, over the whole world."""
    grad_norm: float
    targets: int
    """Scored targets of the step, over the whole world."""
    skipped: str | None = None
    """Why no step was taken, where train.nonfinite=skip: what was not finite, and where."""


def train_step(run: Run, batches: list[MicroBatch], lr: float) -> StepReport:
    """batches: this data rank's microbatches. Collective over the world."""
    targets = count_targets(run, batches)
    with run.engine.accumulate():
        terms = run.passes.forward_backward(batches, scale=1 / max(1, targets))
        sum_tied_gradients(run.params, run.mesh.ends)
        sum_partial_gradients(run.params)
        loss, trouble = agree(run.mesh, terms, targets, run.params)
        if trouble:  # zeros travel through the reduction: nan would spread to every rank
            for gradient in (p.tensor.grad for p in run.params if p.tensor.grad is not None):
                gradient.zero_()
    if trouble:
        run.engine.discard()
    else:
        norm = run.engine.step(lr).grad_norm
        if math.isfinite(norm):
            return StepReport(loss, norm, targets)
        trouble = Trouble("the norm of all ranks' gradients together is not finite")  # the engine took no step
    if trouble.in_weights or run.config.train.nonfinite == "stop":
        raise NotFiniteError(_refusal(batches[0].step + 1, trouble))
    return StepReport(loss, math.nan, targets, skipped=trouble.where)


def _refusal(step: int, trouble: Trouble) -> str:
    if trouble.in_weights:
        fix = "lower optim.lr and go on from a checkpoint before it: skipping steps cannot mend a weight"
    else:
        fix = "lower optim.lr, or leave such steps out with train.nonfinite=skip"
    return f"step {step}: {trouble.where}. Fix: {fix}."


def count_targets(run: Run, batches: list[MicroBatch]) -> int:
    """The one denominator of the step. The same on all ranks: every tensor and pipeline rank has the same batches."""
    counts = sum(OBJECTIVES[run.config.objective.name].count(b) for b in batches)
    return int(run.mesh.dp.sum_(torch.tensor(float(counts), dtype=torch.float64, device=run.mesh.device)).item())
