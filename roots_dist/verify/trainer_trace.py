"""Trace of the trainer's own loop on random text, on one rank: `roots train` itself runs, and is observed.

    trace_training(rank, size, config) --runs/train/loop.py, in track.folder--> what testing/parity.py merges
    trace_training_bits                                                     --> what verify/exact.py compares

The loop opens the sources, orders the samples, chooses the learning rate, unfreezes, evaluates, saves and resumes as in
a real run. Replaced are the files of text by random text, and the measurement of the machine's peak by none.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

from torch import nn

from roots_dist.checks.checks import layout_for
from roots_dist.config.schema import Config
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.parallel.zero.seam import Engine
from roots_dist.runs.ranks.join import device_for
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.runs.train.loop import TrainParts, train
from roots_dist.runs.train.state import TrainState
from roots_dist.runs.train.step import StepReport
from roots_dist.testing.bits import Bits, bits_of_step
from roots_dist.testing.parity import GradientRecorder, recording_engine, tensors_of_rank
from roots_dist.verify.choices import Choices, Chooser
from roots_dist.world.mesh import Mesh

MEASURED = ("time", "time/", "speed/", "memory/", "util/", "plan/")
"""Beginnings of metrics that say how fast and how large, not what was computed."""


def trace_training(rank: int, size: int, config: Config, choices: Choices | None = None) -> dict[str, Any]:
    """Train from where the run's folder stands to the end, on this rank of a world, and return what `merge` of
    testing/parity.py combines. choices: the experts to take, if they are known; what the rank has found of them comes
    with the rest (verify/choices.py). None: each run takes its own."""
    mesh = _connect(rank, size, config)
    recorded: list[GradientRecorder] = []
    states: list[TrainState] = []
    losses, norms = [], []

    def note(state: TrainState, report: StepReport) -> None:
        states[:] = [state]
        losses.append(report.loss)
        norms.append(report.grad_norm)

    chooser = None if choices is None else Chooser(choices)
    record = recording_engine(recorded)

    def make_engine(config: Config, mesh: Mesh, module: nn.Module, *others: Any) -> Engine:
        if chooser is not None:
            chooser.watch(module)
        return record(config, mesh, module, *others)

    parts = TrainParts(proof_objective, make_engine, lambda config, mesh: None, (note,))
    logged = _train(config, mesh, parts)
    found = {} if chooser is None else chooser.found()
    return {"losses": losses, "norms": norms, "logged": logged, **found, **tensors_of_rank(states[0].run, recorded[0])}


def trace_training_bits(rank: int, size: int, config: Config) -> dict[str, Any]:
    """Train an exact run likewise, and return the digests after each step, and rank 0 also those of what it logged."""
    steps: list[Bits] = []

    def note(state: TrainState, report: StepReport) -> None:
        steps.append(bits_of_step(state.run, report))

    parts = TrainParts(proof_objective, peak_of_devices=lambda config, mesh: None, on_step=(note,))
    logged = _train(config, _connect(rank, size, config), parts)
    return {"steps": steps, "logged": [[step, name, float(value).hex()] for step, name, value in logged]}


def _connect(rank: int, size: int, config: Config) -> Mesh:
    mesh = Mesh.connect(layout_for(config, size), rank, device_for(config, rank))
    assert mesh.device.type == config.train.device, "this torch sees no GPU: install one that is built with CUDA"
    return mesh


def _train(config: Config, mesh: Mesh, parts: TrainParts) -> list[list[Any]]:
    """Train to the end, and return what rank 0 has logged."""
    with contextlib.redirect_stdout(io.StringIO()):  # the progress of a run that nobody has started
        code = train(config, mesh, parts)
    assert code == 0, code
    return _logged(Path(config.track.folder)) if mesh.rank == 0 else []


def _logged(folder: Path) -> list[list[Any]]:
    """Metrics of each step in the run's metrics.jsonl, except those that are measured: [step, name, value]."""
    return [
        [record["step"], name, math.nan if value is None else value]
        for record in read_lines(folder / METRICS_FILE)
        for name, value in record.items()
        if name != "step" and not name.startswith(MEASURED)
    ]
