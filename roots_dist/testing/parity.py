"""Check that a layout computes what one process computes: run both on the same batches and compare everything by name.

    trace(rank, size, config) on each rank of a world --merge--> Trace --differences(alone, parallel)--> table

A trace holds each step's loss, gradient norm and gradients, and the master weights and moments at the end. Batches are
random documents as the objective collates them, with some unscored targets, so that microbatches differ. The module is
part of the package so that users can verify their own layers; `roots verify` and tests/parity use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roots_dist.assembly.run import Run, build_run
from roots_dist.config.lr_schedules import lr_schedule
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.zero.build import build_engine
from roots_dist.parallel.zero.seam import STATE, Engine, Update
from roots_dist.runs.train.step import train_step
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param, assemble


class _GradientRecorder:
    """An engine that records what each backward left in .grad, before it is summed over data ranks."""

    def __init__(self, engine: Engine, params: Sequence[Param]):
        self._engine, self._params = engine, params
        self.gradients: list[dict[str, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with self._engine.accumulate():
            yield
            self.gradients.append(
                {
                    p.name: p.tensor.grad.detach().clone()
                    for p in self._params
                    if p.is_counted and p.tensor.grad is not None
                }
            )

    def step(self, lr: float) -> Update:
        return self._engine.step(lr)


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
    layout = Layout(dp=size // (config.parallel.tp * config.parallel.pp), pp=config.parallel.pp, tp=config.parallel.tp)
    mesh = Mesh.connect(layout, rank)
    recorded: list[_GradientRecorder] = []

    def recording(
        config: Config, mesh: Mesh, module: torch.nn.Module, params: list[Param], trainable: Mapping[str, Any]
    ) -> Engine:
        recorded.append(_GradientRecorder(build_engine(config, mesh, module, params, trainable), params))
        return recorded[0]

    run = build_run(config, mesh, recording, proof_objective(config))
    if load_from:
        from roots_dist.storage.checkpoint.load import load

        load(Path(load_from), run.engine, run.params, mesh)
    learning_rate = lr_schedule(config.optim, config.train.steps)
    losses, norms = [], []
    for step in range(first, last):
        report = train_step(run, random_batches(config, step, mesh.dp.rank, mesh.dp.size), learning_rate(step))
        losses.append(report.loss)
        norms.append(report.grad_norm)
    if save_to:
        from roots_dist.storage.checkpoint.save import save

        save(Path(save_to), last, run.engine, run.params, mesh, {})
    return {"losses": losses, "norms": norms, **_tensors(run, recorded[0])}


def _tensors(run: Run, recorded: _GradientRecorder) -> dict[str, Any]:
    counted = [p for p in run.params if p.is_counted]
    state = {p.name: run.engine.read_state(p.name) for p in run.params}
    return {
        "shapes": {p.name: list(p.spec.shape) for p in counted},
        "slices": {p.name: [[s.start, s.stop] for s in p.slices] for p in run.params},
        "gradients": recorded.gradients,
        "state": {p.name: state[p.name] for p in counted} if run.mesh.dp.rank == 0 else {},
        "copies": {p.name: state[p.name]["weight"] for p in run.params if not p.is_counted},
    }


@dataclass(frozen=True)
class Trace:
    """What a run computed, in full tensors under global names."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    state: dict[str, dict[str, Tensor]]
    disagreement: list[tuple[str, float]]
    """What several ranks hold or report (losses, norms, replicated and tied weights), and by how much it differs."""

    def then(self, resumed: Trace) -> Trace:
        """This run, continued by the one that resumed from its checkpoint, as one run."""
        return Trace(
            self.losses + resumed.losses,
            self.norms + resumed.norms,
            self.gradients + resumed.gradients,
            resumed.state,
            self.disagreement + resumed.disagreement,
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
            kind: assemble(
                shape, [(slices(r, name), r["state"][name][kind]) for r in ranks if kind in r["state"].get(name, ())]
            )
            for kind in STATE
            if any(kind in r["state"].get(name, ()) for r in ranks)
        }
        for name, shape in names.items()
    }
    disagreement = [
        (f"{what}, step {i}, rank {r}", abs(a - b))
        for what in ("losses", "norms")
        for r, rank in enumerate(ranks)
        for i, (a, b) in enumerate(zip(ranks[0][what], rank[what]))
    ]
    disagreement += [
        (f"{name}, rank {r}", _largest(state[name]["weight"][slices(rank, name)], copy))
        for r, rank in enumerate(ranks)
        for name, copy in rank["copies"].items()
    ]
    steps = range(len(ranks[0]["gradients"]))
    return Trace(ranks[0]["losses"], ranks[0]["norms"], [summed(s) for s in steps], state, disagreement)


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
    """
    rows = [
        _row(
            "loss",
            [(f"step {i}", abs(a - b)) for i, (a, b) in enumerate(zip(alone.losses, parallel.losses))],
            bounds["loss"],
        ),
        _row(
            "gradient norm",
            [(f"step {i}", abs(a - b)) for i, (a, b) in enumerate(zip(alone.norms, parallel.norms))],
            bounds["norm"],
        ),
    ]
    for name in alone.state.keys() | parallel.state.keys():  # trained parameters have moments, frozen ones have none
        kept = [trace.state.get(name, {}).keys() for trace in (alone, parallel)]
        assert kept[0] == kept[1] and kept[0], (name, *kept)
    for i, (a, b) in enumerate(zip(alone.gradients, parallel.gradients)):
        assert a.keys() == b.keys(), (i, a.keys() ^ b.keys())
    gradients = [
        (f"{name}, step {i}", _largest(a[name], b[name]) / max(1.0, norm))
        for i, (a, b, norm) in enumerate(zip(alone.gradients, parallel.gradients, alone.norms))
        for name in a
    ]
    rows.append(_row("gradients", gradients, bounds["gradient"]))
    for kind in STATE:
        both = [
            (n, _largest(state[kind], parallel.state[n][kind])) for n, state in alone.state.items() if kind in state
        ]
        rows.append(_row(kind.replace("weight", "weights"), both, bounds[kind]))
    rows.append(_row("copies on other ranks", parallel.disagreement, 0.0))
    return rows


def _largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _row(what: str, found: list[tuple[str, float]], bound: float) -> Difference:
    found = [(where, math.inf if math.isnan(value) else value) for where, value in found]
    above = [item for item in found if item[1] > bound]
    where = above[0][0] if above else max(found, key=lambda item: item[1])[0]
    return Difference(what, max(value for _, value in found), bound, where)


FLOAT64_BOUNDS = dict.fromkeys(("loss", "norm", "gradient", *STATE), 1e-10)
"""Bounds for float64: noise is below them, and anything above is a bug."""
