"""DeepSpeed's ZeRO under our layouts, in float32, against one process; and runs that go on in another layout."""

import functools
from pathlib import Path

import pytest
from models import config

from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge, trace
from roots_dist.testing.world import on_world
from roots_dist.verify.verify import FLOAT32_BOUNDS

STEPS = 3
FLOAT32 = dict(advanced__float64=False, advanced__engine="deepspeed", optim__lr=1e-3)


def zero(stage: int, dp: int, model: str = "gpt", **layout: object):
    wanted = {f"parallel__{k}": v for k, v in layout.items()} | dict(
        parallel__zero_stage=stage, train__micro_batch=2 if dp == 2 else 1
    )
    name = ",".join([model, f"zero_stage={stage}", f"dp={dp}", *(f"{k}={v}" for k, v in layout.items())])
    return pytest.param(config(model, **FLOAT32, **wanted), dp, id=name)


@functools.cache
def _alone(text: str) -> Trace:
    return merge(on_world(1, trace, Config.model_validate_json(text), 0, STEPS))


def alone(parallel: Config) -> Trace:
    return _alone(
        parallel.changed({**ONE_PROCESS, "advanced.engine": "reference", "train.micro_batch": 1}).model_dump_json()
    )


@pytest.mark.parametrize(
    "parallel, dp",
    [
        *(zero(stage, dp) for stage in range(4) for dp in (2, 4)),
        zero(1, 2, tp=2, pp=2, sequence_parallel=True),
        zero(2, 2, tp=2, pp=2),
        zero(3, 2, tp=2, pp=2, sequence_parallel=True),
        zero(1, 2, "llama", pp=2, schedule="interleaved", virtual_stages=2),
        zero(1, 2, "llama", pp=2, schedule="zb-h1"),
        zero(2, 2, "llama", pp=2, schedule="zb-h1"),
        zero(3, 2, "llama", pp=2, schedule="zb-h1"),
        zero(3, 2, "llama", tp=4),
    ],
)
def test_zero_computes_what_one_process_computes(parallel, dp):
    ranks = on_world(parallel.parallel.tp * parallel.parallel.pp * dp, trace, parallel, 0, STEPS, timeout=200)
    rows = differences(alone(parallel), merge(ranks), FLOAT32_BOUNDS)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


LAYOUTS = {
    "one process": (dict(), 1),
    "TP2×PP2×DP2 ZeRO-1": (dict(parallel__tp=2, parallel__pp=2, parallel__zero_stage=1), 2),
    "PP4": (dict(parallel__pp=4), 1),
    "TP2 SP, ZeRO-3": (dict(parallel__tp=2, parallel__sequence_parallel=True, parallel__zero_stage=3), 2),
    "PP2 interleaved, ZeRO-2": (
        dict(parallel__pp=2, parallel__virtual_stages=2, parallel__schedule="interleaved", parallel__zero_stage=2),
        2,
    ),
}


@pytest.mark.parametrize(
    "first, second, third",
    [
        ("TP2×PP2×DP2 ZeRO-1", "PP4", "TP2 SP, ZeRO-3"),
        ("TP2×PP2×DP2 ZeRO-1", "one process", "PP2 interleaved, ZeRO-2"),
        ("TP2 SP, ZeRO-3", "PP2 interleaved, ZeRO-2", "TP2×PP2×DP2 ZeRO-1"),
    ],
)
def test_a_run_goes_on_on_the_same_curve_in_other_layouts(first, second, third, tmp_path):
    """Resumed twice, a step in each layout."""
    whole, before = None, None
    for step, name in enumerate((first, second, third)):
        layout, dp = LAYOUTS[name]
        engine = "deepspeed" if dp > 1 else "reference"
        here = config(**FLOAT32 | dict(advanced__engine=engine), **layout)
        size = here.parallel.tp * here.parallel.pp * dp
        after = str(tmp_path / str(step))
        found = merge(on_world(size, trace, here, step, step + 1, before, after, timeout=200))
        whole = whole.then(found) if whole else found
        (folder,) = (Path(after) / "checkpoints").iterdir()
        before = str(folder)
    truth = alone(config(**FLOAT32))
    rows = differences(truth, whole, FLOAT32_BOUNDS)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


def test_a_run_goes_on_in_float64_to_the_last_digits(tmp_path):
    """Without ZeRO's float32 the resumed curve is the same curve, in both directions."""
    one, many = config("llama"), config("llama", parallel__tp=2, parallel__pp=2, parallel__sequence_parallel=True)
    truth = merge(on_world(1, trace, one.changed(ONE_PROCESS), 0, STEPS))
    for index, (first, second) in enumerate(((one, many), (many, one))):
        sizes = [c.parallel.tp * c.parallel.pp for c in (first, second)]
        run = str(tmp_path / str(index))
        first_half = merge(on_world(sizes[0], trace, first, 0, 2, None, run))
        (folder,) = (Path(run) / "checkpoints").iterdir()
        ended = merge(on_world(sizes[1], trace, second, 2, STEPS, str(folder)))
        rows = differences(truth, first_half.then(ended), FLOAT64_BOUNDS)
        assert all(row.passed for row in rows), "\n".join(map(str, rows))
