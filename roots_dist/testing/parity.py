"""Check that a layout computes what one process computes: run both on the same batches and compare everything by name.

    trace(rank, size, config) on each rank of a world --merge--> Trace --differences(alone, parallel)--> table

A trace holds each step's loss, gradient norm and gradients, and the master weights and moments at the end. Batches are
random documents as the objective collates them, with some unscored targets, so that microbatches differ. The module is
part of the package so that users can verify their own layers; `roots verify` and tests/parity use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from roots_dist.assembly.run import Run, build_run
from roots_dist.checks.checks import layout_for
from roots_dist.config.records import learning_rate_of
from roots_dist.config.schema import Config
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.parallel.zero.build import build_engine
from roots_dist.parallel.zero.seam import STATE, Engine
from roots_dist.runs.train.step import train_step
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import ParamTensor, assemble


class GradientRecorder:
    """Records the gradients of each step on a data rank: their sum over data ranks is that of the step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def __call__(self, gradients: Iterable[ParamTensor]) -> None:
        self.gradients.append({p.name: gradient.detach().clone() for p, gradient in gradients if p.is_counted})


def recording_engine(recorded: list[GradientRecorder]) -> Callable[..., Engine]:
    """A maker of engines, for build_run, that adds a recorder to the list for each engine that it makes."""

    def make_engine(*parts: Any) -> Engine:
        engine = build_engine(*parts)
        recorded.append(GradientRecorder())
        engine.on_gradients = recorded[-1]
        return engine

    return make_engine


def trace(
    rank: int,
    size: int,
    config: Config,
    first: int,
    last: int,
    load_from: str | None = None,
    save_to: str | None = None,
) -> dict[str, Any]:
    """Run steps first … last-1 on one rank and return what `merge` combines. testing.world.on_world calls it."""
    mesh = Mesh.connect(layout_for(config, size), rank)
    recorded: list[GradientRecorder] = []
    objective = proof_objective(config)
    batches = Batches(config, objective, [objective.open("random")], [1.0], mesh.dp.rank, mesh.dp.size)
    run = build_run(config, mesh, recording_engine(recorded), objective)
    if load_from:
        from roots_dist.storage.checkpoint.load import load

        load(Path(load_from), run.engine, run.params, mesh)
    learning_rate = learning_rate_of(config)
    losses, norms = [], []
    for step in range(first, last):
        report = train_step(run, batches.at(step), learning_rate(step))
        losses.append(report.loss)
        norms.append(report.grad_norm)
    if save_to:
        from roots_dist.storage.checkpoint.save import save

        if mesh.rank == 0:
            Path(save_to).mkdir(parents=True, exist_ok=True)
        save(Path(save_to), last, run.engine, run.params, mesh, {})
    return {"losses": losses, "norms": norms, **tensors_of_rank(run, recorded[0])}


def tensors_of_rank(run: Run, recorded: GradientRecorder) -> dict[str, Any]:
    """The gradients that were recorded, and this rank's weights and moments as they are now. Collective over dp."""
    counted = [p for p in run.params if p.is_counted]
    state = {p.name: run.engine.read_state(p.name) for p in run.params}
    return {
        "shapes": {p.name: list(p.spec.shape) for p in counted},
        "slices": {p.name: [[s.start, s.stop] for s in p.slices] for p in run.params},
        "gradients": recorded.gradients,
        "state": {p.name: state[p.name] for p in counted if run.mesh.holders(p.spec.of_expert).rank == 0},
        "copies": {p.name: state[p.name]["weight"] for p in run.params if not p.is_counted},
    }


@dataclass(frozen=True)
class Trace:
    """Results of a run, in full tensors under global names."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    state: dict[str, dict[str, Tensor]]
    disagreement: dict[str, float]
    """Values that several ranks hold or report (losses, norms, replicated and tied weights) -> largest difference
    between these ranks."""
    logged: dict[tuple[int, str], float] | None
    """Metrics that the run logged: step and name -> value; None if it was not the trainer's own loop."""

    def after(self, step: int) -> Trace:
        """The part of this run that follows its first `step` steps."""
        logged = self.logged and {key: value for key, value in self.logged.items() if key[0] > step}
        return replace(
            self, losses=self.losses[step:], norms=self.norms[step:], gradients=self.gradients[step:], logged=logged
        )


def merge(ranks: Sequence[Mapping[str, Any]]) -> Trace:
    """Combine what the ranks of a run returned. Gradients of data ranks are summed here, because backward leaves them
    unsummed."""
    names = {name: tuple(shape) for rank in ranks for name, shape in rank["shapes"].items()}

    def slices(rank: Mapping[str, Any], name: str) -> tuple[slice, ...]:
        return tuple(slice(*s) for s in rank["slices"][name])

    def summed(step: int) -> dict[str, Tensor]:
        whole = {}
        for rank in ranks:
            for name, part in rank["gradients"][step].items():
                if name not in whole:
                    whole[name] = part.new_zeros(names[name])
                whole[name][slices(rank, name)] += part
        return whole

    state = {
        name: {
            kind: _assembled(
                shape, [(slices(r, name), r["state"][name][kind]) for r in ranks if kind in r["state"].get(name, ())]
            )
            for kind in STATE
            if any(kind in r["state"].get(name, ()) for r in ranks)
        }
        for name, shape in names.items()
    }
    disagreement = {
        f"{what}, step {i}, rank {r}": abs(a - b)
        for what in ("losses", "norms")
        for r, rank in enumerate(ranks)
        for i, (a, b) in enumerate(zip(ranks[0][what], rank[what], strict=True))
    }
    disagreement |= {
        f"{name}, rank {r}": _largest(state[name]["weight"][slices(rank, name)], copy)
        for r, rank in enumerate(ranks)
        for name, copy in rank["copies"].items()
    }
    steps = range(len(ranks[0]["gradients"]))
    logged = {(step, name): value for step, name, value in ranks[0]["logged"]} if "logged" in ranks[0] else None
    return Trace(ranks[0]["losses"], ranks[0]["norms"], [summed(s) for s in steps], state, disagreement, logged)


def _assembled(shape: Sequence[int], slices: Sequence[tuple[tuple[slice, ...], Tensor]]) -> Tensor:
    """The whole tensor; what no rank holds, or two count, is NaN, which equals nothing."""
    whole = assemble(shape, slices)
    return whole if sum(part.numel() for _, part in slices) == whole.numel() else torch.full_like(whole, math.nan)


@dataclass(frozen=True)
class Difference:
    """One row of the table."""

    what: str
    largest: float
    bound: float
    where: str
    """First tensor or step, in the order of computation, that exceeds the bound; if none does, the one that differs
    most."""

    @property
    def passed(self) -> bool:
        return self.largest <= self.bound


def differences(alone: Trace, parallel: Trace, bounds: Mapping[str, float]) -> list[Difference]:
    """Largest absolute difference of losses, norms, gradients, weights and both moments, and of what several ranks
    hold, which must agree to the bit: no loss shows a drifting copy for weeks. `bounds` has one bound per kind.

    A gradient is compared in units of its step's gradient norm, so that the bound does not depend on the loss's scale.
    A kind of which there is nothing to compare differs infinitely: a comparison never passes on nothing.
    """
    norms = [max(1.0, norm) for norm in alone.norms]
    rows = [
        _row("loss", _steps(alone.losses), _steps(parallel.losses), _absolute, bounds["loss"]),
        _row("gradient norm", _steps(alone.norms), _steps(parallel.norms), _absolute, bounds["norm"]),
        _row("gradients", _gradients(alone, norms), _gradients(parallel, norms), _largest, bounds["gradient"]),
    ]
    rows += [
        _row(kind.replace("weight", "weights"), _kept(alone, kind), _kept(parallel, kind), _largest, bounds[kind])
        for kind in STATE  # trained parameters have moments, frozen ones have none
    ]
    if alone.logged is not None or parallel.logged is not None:
        rows += [
            _row("evaluation", _metrics(alone, True), _metrics(parallel, True), _relative, bounds["loss"]),
            _row(
                "other metrics", _metrics(alone, False), _metrics(parallel, False), _relative_or_unknown, bounds["loss"]
            ),
        ]
    copies = parallel.disagreement
    return [*rows, _row("copies on other ranks", dict.fromkeys(copies, 0.0), copies, _absolute, 0.0)]


def _steps(values: Sequence[float]) -> dict[str, float]:
    return {f"step {i}": value for i, value in enumerate(values)}


def _gradients(trace: Trace, norms: Sequence[float]) -> dict[str, Tensor]:
    """Gradients of each step, in units of its norm. A step that only one run has is seen by its loss."""
    return {
        f"{name}, step {i}": gradient.double() / norm
        for i, (step, norm) in enumerate(zip(trace.gradients, norms))
        for name, gradient in step.items()
    }


def _kept(trace: Trace, kind: str) -> dict[str, Tensor]:
    return {name: state[kind] for name, state in trace.state.items() if kind in state}


def _metrics(trace: Trace, is_score: bool) -> dict[str, float]:
    """Logged metrics of held-out text (is_score), or all others."""
    return {
        f"{name}, step {step}": value
        for (step, name), value in (trace.logged or {}).items()
        if ("/validation" in name) == is_score
    }


def _absolute(a: float, b: float) -> float:
    return abs(a - b)


def _relative(a: float, b: float) -> float:
    """Relative to the first, of numbers that are not tiny: a learning rate that is wrong by a percent is seen."""
    return abs(a - b) / max(SMALL, abs(a))


def _relative_or_unknown(a: float, b: float) -> float:
    """The relative difference of two metrics. One that neither run could measure is NaN in both, and does not
    differ."""
    return 0.0 if math.isnan(a) and math.isnan(b) else _relative(a, b)


def _largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


V = TypeVar("V")


def _row(
    what: str, a: Mapping[str, V], b: Mapping[str, V], difference: Callable[[V, V], float], bound: float
) -> Difference:
    """The row of two sets of named values. What only one of them has differs infinitely."""
    found = {name: difference(a[name], b[name]) if name in a and name in b else math.inf for name in {**a, **b}}
    found = {name: math.inf if math.isnan(value) else value for name, value in found.items()}
    if not found:
        return Difference(what, math.inf, bound, "nothing to compare")
    above = next((name for name, value in found.items() if value > bound), None)
    return Difference(what, max(found.values()), bound, above or max(found, key=lambda name: found[name]))


SMALL = 1e-2
"""Metrics below it are compared as if they were this large."""
FLOAT64_BOUNDS = dict.fromkeys(("loss", "norm", "gradient", *STATE), 1e-10)
"""Bounds for float64: noise is below them, and anything above is a bug."""
