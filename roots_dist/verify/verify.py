"""`roots verify CONFIG`: proof on CPU that the config's layout computes what one process computes, before it costs GPU
hours.

    config --shrink--> small config --testing.parity on real processes--> table of differences, verdict

Tensor, sequence and pipeline parallelism are compared in float64, where noise is below 1e-10 and anything above is a
bug; ZeRO is DeepSpeed's float32, compared with a stated bound. Then a run is saved half-way and resumed in another
layout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.schedule.schedules import DEFAULT, SCHEDULES
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge, trace
from roots_dist.testing.world import on_world
from roots_dist.verify.proof import Proof
from roots_dist.verify.proof_table import show
from roots_dist.verify.shrink import SmallConfig, shrink

FLOAT32_BOUNDS: Mapping[str, float] = {
    "loss": 1e-5, "norm": 1e-5, "gradient": 1e-5, "weight": 1e-4, "exp_avg": 1e-6, "exp_avg_sq": 1e-8,
}  # fmt: skip
"""Bounds for float32 through DeepSpeed: sums are rounded in another order, and Adam amplifies it (a weight moves by up
to lr per step whatever its gradient's size, so tiny gradients turn rounding into steps)."""


def describe(small: SmallConfig) -> str:
    p = small.config.parallel
    parts = [str(Layout(small.dp, p.pp, p.tp))]
    parts += ["SP"] if p.sequence_parallel else []
    parts += [p.schedule if p.virtual_stages == 1 else f"{p.schedule} × {p.virtual_stages} chunks"] if p.pp > 1 else []
    parts += [f"ZeRO-{p.zero_stage}"] if small.dp > 1 else []
    return " ".join(parts)


def alone(config: Config, steps: int) -> Trace:
    """Trace of one process, one sequence at a time, by the reference engine: nothing of the layout is left."""
    single = {**ONE_PROCESS, "advanced.engine": "reference", "train.micro_batch": 1, "train.recompute": "none"}
    return merge(on_world(1, trace, config.changed(single), 0, steps))


def prove(small: SmallConfig, steps: int) -> Iterator[Proof]:
    """Compare the layout; then a run saved half-way in it and resumed in one process, and the other way round."""
    config, float64 = small.config, small.config.advanced.float64
    bounds = FLOAT64_BOUNDS if float64 else FLOAT32_BOUNDS
    title = f"{describe(small)}, {'float64' if float64 else 'float32'}"
    truth = alone(config, steps)
    found = merge(on_world(small.ranks, trace, config, 0, steps, timeout=300))
    yield Proof(title, small.notes, tuple(differences(truth, found, bounds)))

    if small.ranks == 1:
        return
    half = max(1, steps // 2)
    single = config.changed({**ONE_PROCESS, "advanced.engine": "reference"})
    for first, first_ranks, second, second_ranks, words in (
        (config, small.ranks, single, 1, "saved in this layout, resumed in one process"),
        (single, 1, config, small.ranks, "saved by one process, resumed in this layout"),
    ):
        with tempfile.TemporaryDirectory(prefix="roots-verify-") as folder:
            before = merge(on_world(first_ranks, trace, first, 0, half, None, folder, timeout=300))
            (saved,) = (Path(folder) / "checkpoints").iterdir()
            after = merge(on_world(second_ranks, trace, second, half, steps, str(saved), timeout=300))
        yield Proof(f"{title}, {words} after step {half}", (), tuple(differences(truth, before.then(after), bounds)))


def proofs(config: Config, steps: int) -> Iterator[Proof]:
    """All proofs of a config: TP × SP × PP in float64, then with two data ranks and its ZeRO stage."""
    yield from prove(shrink(config, dp=1, float64=True), steps)
    yield from prove(shrink(config, dp=2, float64=config.parallel.zero_stage == 0), steps)


MATRIX: tuple[dict[str, object], ...] = tuple(
    {"parallel.tp": tp, "parallel.pp": pp, "parallel.sequence_parallel": tp > 1 and sequence,
     "parallel.schedule": schedule,
     "parallel.virtual_stages": 2 if SCHEDULES[schedule].virtual_stages else 1, "parallel.zero_stage": zero}
    for tp, pp, sequence, schedule, zero in [
        *((tp, 1, sequence, DEFAULT, 0) for sequence in (False, True) for tp in (2, 4)),
        *((1, pp, False, name, 0) for pp in (2, 4) for name in SCHEDULES),
        *((2, 2, True, name, 0) for name, s in SCHEDULES.items()
          if name == DEFAULT or s.virtual_stages or s.splits_backward),
        (4, 2, True, DEFAULT, 0),
        (1, 1, False, DEFAULT, 1), (1, 1, False, DEFAULT, 2), (1, 1, False, DEFAULT, 3),
        (2, 1, True, DEFAULT, 1), (1, 2, False, DEFAULT, 2), (2, 2, True, DEFAULT, 1), (2, 2, True, DEFAULT, 2),
        (2, 2, True, DEFAULT, 3),
    ]
)  # fmt: skip
"""The grid of `roots verify --matrix`: tensor, sequence and pipeline degrees, every schedule, every ZeRO stage."""


def matrix_proofs(config: Config, steps: int) -> Iterator[Proof]:
    """Proofs of every layout of MATRIX, with this config's model."""
    for values in MATRIX:
        zero = values["parallel.zero_stage"]
        yield from prove(shrink(config.changed(values), dp=2 if zero else 1, float64=not zero), steps)


def verify(config: Config, *, steps: int, matrix: bool) -> bool:
    """Print the proofs as they come. Returns whether all passed."""
    return show(matrix_proofs(config, steps) if matrix else proofs(config, steps))
