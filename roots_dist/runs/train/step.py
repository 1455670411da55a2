"""One optimizer step, top to bottom. Every rank calls it; the report is the same on all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roots_dist.assembly.run import Run
from roots_dist.config.records import objective_of
from roots_dist.errors import NotFiniteError
from roots_dist.learning.models.pieces import compute_dtype
from roots_dist.learning.models.router_terms import router_counts, router_weights
from roots_dist.parallel.zero.seam import master_dtype
from roots_dist.runs.train.check_finite import NonFinite, sum_over_ranks
from roots_dist.runs.train.expert_load import balance_by_bias, take_step_loads
from roots_dist.world.batch import MicroBatch


@dataclass(frozen=True)
class StepReport:
    loss: float
    """The differentiated value: Σ over terms of weight · sum / count, over the whole world."""
    grad_norm: float
    terms: Mapping[str, float]
    """Value (sum / count) of each term."""
    group_norms: Mapping[str, float]
    """Gradient norm of each AdamW group."""
    skipped: str | None = None
    """The reason why the step was not taken: what was not finite, and where (train.nonfinite=skip), or how large the
    loss or the norm was. None if it was taken."""
    is_spike: bool = False
    """True if it was not taken because of its loss or norm (runs/train/spikes.py)."""
    is_rewound: bool = False
    """True if the run has gone back to a checkpoint because of that (runs/train/rewind.py)."""
    stop: int = 0
    """Signal that told a rank to stop after this step; 0 if there was none."""


def train_step(
    run: Run,
    batches: list[MicroBatch],
    lr: float,
    stop: int = 0,
    limit: float = math.inf,
    norm_limit: float = math.inf,
) -> StepReport:
    """Take one optimizer step. `batches` are this data rank's microbatches, on the host: a GPU that is asked for what
    they count makes the host wait; `stop` is the signal that told this rank to stop after the step, 0 if none.
    A step whose loss is above `limit`, or its gradient's norm above `norm_limit`, is skipped. Collective over the
    world."""
    run.engine.unfreeze(batches[0].step)
    counts = count_targets(run, batches)
    batches = on_device(run, batches)
    weights = loss_weights(run)
    run.watch.lap("dp")
    exact = run.passes.model.tp.exact
    if exact is not None:
        exact.begin(len(batches))
    with run.engine.accumulate():
        found = run.passes.forward_backward(batches, scales(run, counts))
        run.watch.lap("compute")
        if exact is not None:
            exact.collect(run.params)
    loads = take_step_loads(run, batches[0].step)
    sums, nonfinite, stop, squares = sum_over_ranks(run.mesh, found, counts, run.engine, stop)
    run.watch.lap("pp_wait" if run.mesh.pp.size > 1 else "dp")  # stages that finish first wait here for the others
    terms = {name: total / max(1.0, count) for name, (total, count) in sums.items()}
    loss = sum(weights[name] * value for name, value in terms.items())
    is_spike = loss > limit
    if is_spike:
        run.engine.zero_grad()
        why = f"loss {loss:.4g} is a spike: it is above {limit:.4g}"
        return StepReport(loss, math.nan, terms, {}, skipped=why, stop=stop, is_spike=True)
    if nonfinite:
        run.engine.zero_grad()
    else:
        update = run.engine.step(lr, norm_limit, squares)
        run.watch.lap("dp")
        if norm_limit < update.grad_norm < math.inf:
            why = f"gradient norm {update.grad_norm:.4g} is a spike: it is above {norm_limit:.4g}"
            return StepReport(loss, update.grad_norm, terms, {}, skipped=why, stop=stop, is_spike=True)
        if math.isfinite(update.grad_norm):
            balance_by_bias(run, loads)
            return StepReport(loss, update.grad_norm, terms, update.by_group, stop=stop)
        nonfinite = NonFinite("the norm of all ranks' gradients together is not finite")  # the engine took no step
    if nonfinite.in_weights or run.config.train.nonfinite == "stop":
        raise NotFiniteError(_nonfinite_message(batches[0].step + 1, nonfinite))
    return StepReport(loss, math.nan, terms, {}, skipped=nonfinite.where, stop=stop)


def _nonfinite_message(step: int, nonfinite: NonFinite) -> str:
    if nonfinite.in_weights:
        fix = "lower optim.lr and resume from an earlier checkpoint: skipping steps cannot repair a weight"
    else:
        fix = "lower optim.lr, or skip such steps with train.nonfinite=skip"
    return f"step {step}: {nonfinite.where}. Fix: {fix}."


def on_device(run: Run, batches: list[MicroBatch]) -> list[MicroBatch]:
    """Microbatches with the positions that are scored, where not all are, on this rank's device."""
    tp, masks = run.passes.model.tp, objective_of(run.config).masks
    if masks:
        batches = [batch.with_scored_positions(tp.of_context) for batch in batches]
    else:
        batches = [batch.with_some_scored(tp.of_context) for batch in batches]
    return [batch.to(run.mesh.device) for batch in batches]


def loss_weights(run: Run) -> dict[str, float]:
    """Weight of each term in the loss that is learned: those of the objective, and those of routers."""
    return {**run.objective.weights, **router_weights(run.config)}


def count_targets(run: Run, batches: list[MicroBatch]) -> dict[str, Tensor]:
    """Count the targets of each term over all data ranks, float64: the only denominator of the loss. Equal on all
    ranks, because every tensor and pipeline rank has the same batches. Not read here: the host would wait."""
    names = list(loss_weights(run))
    counted = [{**run.objective.counts(batch), **router_counts(run.config, batch)} for batch in batches]
    sums = [float(sum(counts[name] for counts in counted)) for name in names]
    total = run.mesh.dp.sum_(torch.tensor(sums, dtype=torch.float64, device=run.mesh.device))
    return dict(zip(names, total.unbind()))


def scales(run: Run, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factor of each term's sum in the loss, in the dtype of the sums."""
    weights, dtype = loss_weights(run), master_dtype(compute_dtype(run.config))
    return {name: (torch.full_like(n, weights[name]) / n.clamp(min=1)).to(dtype) for name, n in counts.items()}
