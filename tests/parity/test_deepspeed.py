"""ZeRO under our layouts against one process: the built-in engine in float64, DeepSpeed in float32; and runs that go on
in another layout."""

from pathlib import Path

import pytest
from cases import FLOAT32, alone, case, compare
from models import config

from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge, trace
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.verify.proofs import FLOAT32_BOUNDS

STEPS = 3
"""Steps of a run that goes on: one in each layout."""
SP = dict(tp=2, sequence_parallel=True)


def zero(stage: int, dp: int, model: str = "gpt", **wanted: object):
    return case(model, dp=dp, zero_stage=stage, train__micro_batch=2 if dp == 2 else 1, **FLOAT32, **wanted)


FEATURED = ("llama", "gemma", "olmo", "stable", "neox", "falcon", "mixtral")
"""Models that have what few families have."""
LATENTS = ({}, dict(cp=2), SP, dict(pp=2, train__recompute="full"))
"""Layouts of latent attention, whose matrices on the way down no tensor rank cuts, and data ranks do."""
CASES = [
    *(zero(stage, 2) for stage in range(4)),
    *(zero(stage, 4, full=True) for stage in range(4)),  # three ranks in tests/conformance
    zero(1, 2, **SP),
    zero(0, 2, tp=2),
    zero(3, 2, cp=2),
    zero(1, 2, cp=4, full=True),
    zero(2, 2, pp=2),
    zero(1, 3, pp=2, train__global_batch=12),  # the sum of three depends on their order: tied copies must not drift
    *(zero(stage, 2, pp=2, full=stage == 2, **SP) for stage in (1, 2, 3)),
    zero(2, 2, tp=2, pp=2, full=True),
    zero(1, 2, "llama", pp=2, schedule="interleaved", virtual_stages=2),
    *(zero(stage, 2, model, pp=2, schedule="zb-h1") for stage, model in ((1, "llama"), (2, "gemma"), (3, "falcon"))),
    zero(3, 2, "mixtral", pp=2, schedule="zb-h1"),
    zero(3, 2, "olmo", tp=2),
    zero(3, 2, "qwen-moe", tp=2, train__recompute="full"),
    *(zero(stage, 2, "deepseek", full=True, **more) for stage in (2, 3) for more in LATENTS),
    zero(3, 2, "olmo", full=True, tp=4),
    zero(3, 2, "qwen-moe", full=True, tp=2, pp=2, train__recompute="full"),
    *(zero(stage, 2, model, full=True, tp=2, pp=2) for stage in (1, 2, 3) for model in FEATURED),
]


@pytest.mark.parametrize("case", CASES)
def test_zero_computes_what_one_process_computes(case):
    compare(case, FLOAT32_BOUNDS)


def built_in(stage: int, model: str = "gpt", full: bool = False, **wanted: object):
    return case(model, full=full, dp=2, zero_stage=stage, train__micro_batch=2, **wanted)


BUILT_IN = [
    *(built_in(stage) for stage in (2, 3)),  # stage 1 is among the covered layouts
    built_in(2, "gemma", full=True, pp=2, schedule="zb-h1"),
    built_in(3, "falcon", full=True, pp=2, schedule="zb-h1"),
    built_in(3, "olmo", full=True, tp=4),
    built_in(3, "gpt", full=True, cp=2),
    *(built_in(stage, "deepseek", full=True, **more) for stage in (2, 3) for more in LATENTS),
    built_in(3, "qwen-moe", full=True, tp=2, pp=2, train__recompute="full"),
    *(built_in(stage, model, full=True, tp=2, pp=2) for stage in (1, 2, 3) for model in FEATURED),
]


@pytest.mark.parametrize("case", BUILT_IN)
def test_the_built_in_zero_does_in_float64(case):
    compare(case)


def one_run(*parts: Trace) -> Trace:
    """A run and those that resumed from its checkpoint, one after the other."""
    return Trace(
        losses=[loss for part in parts for loss in part.losses],
        norms=[norm for part in parts for norm in part.norms],
        gradients=[step for part in parts for step in part.gradients],
        state=parts[-1].state,
        disagreement={
            f"{where}, part {i}": d for i, part in enumerate(parts) for where, d in part.disagreement.items()
        },
        logged=None,
    )


LAYOUTS = {
    "one process": (dict(), 1),
    "TP2×PP2×DP2 ZeRO-1": (dict(parallel__tp=2, parallel__pp=2, parallel__zero_stage=1), 2),
    "PP4": (dict(parallel__pp=4), 1),
    "CP2, ZeRO-1": (dict(parallel__cp=2, parallel__zero_stage=1), 2),
    "CP4": (dict(parallel__cp=4), 1),
    "TP2 SP, ZeRO-3": (dict(parallel__tp=2, parallel__sequence_parallel=True, parallel__zero_stage=3), 2),
    "PP2 interleaved, ZeRO-2": (
        dict(parallel__pp=2, parallel__virtual_stages=2, parallel__schedule="interleaved", parallel__zero_stage=2),
        2,
    ),
}


@pytest.mark.parametrize(
    "first, second, third",
    [
        pytest.param("TP2×PP2×DP2 ZeRO-1", "PP4", "TP2 SP, ZeRO-3", marks=pytest.mark.full),
        pytest.param("TP2×PP2×DP2 ZeRO-1", "one process", "PP2 interleaved, ZeRO-2", marks=pytest.mark.full),
        pytest.param("CP2, ZeRO-1", "CP4", "PP2 interleaved, ZeRO-2", marks=pytest.mark.full),
        ("TP2 SP, ZeRO-3", "PP2 interleaved, ZeRO-2", "TP2×PP2×DP2 ZeRO-1"),
    ],
)
def test_a_run_goes_on_on_the_same_curve_in_other_layouts(first, second, third, tmp_path):
    """Resumed twice, a step in each layout."""
    parts, before = [], None
    for step, name in enumerate((first, second, third)):
        layout, dp = LAYOUTS[name]
        engine = "deepspeed" if dp > 1 else "reference"
        here = config(**FLOAT32 | dict(advanced__engine=engine), **layout)
        size = here.parallel.ranks_per_sample() * dp
        after = str(tmp_path / str(step))
        found = merge(on_world(size, trace, here, step, step + 1, before, after, timeout=200))
        parts.append(found)
        (folder,) = (Path(after) / "checkpoints").iterdir()
        before = str(folder)
    truth = alone(config(**FLOAT32), STEPS)
    rows = differences(truth, one_run(*parts), FLOAT32_BOUNDS)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


def test_a_run_goes_on_in_float64_to_the_last_digits(tmp_path):
    """Without ZeRO's float32 the resumed curve is the same curve, in both directions."""
    one, many = config("llama"), config("llama", parallel__tp=2, parallel__pp=2, parallel__sequence_parallel=True)
    truth = merge(on_warm_world(1, trace, one.changed(ONE_PROCESS), 0, STEPS))
    for index, (first, second) in enumerate(((one, many), (many, one))):
        sizes = [c.parallel.tp * c.parallel.pp for c in (first, second)]
        run = str(tmp_path / str(index))
        begun = merge(on_warm_world(sizes[0], trace, first, 0, 2, None, run))
        (folder,) = (Path(run) / "checkpoints").iterdir()
        ended = merge(on_warm_world(sizes[1], trace, second, 2, STEPS, str(folder)))
        rows = differences(truth, one_run(begun, ended), FLOAT64_BOUNDS)
        assert all(row.passed for row in rows), "\n".join(map(str, rows))
