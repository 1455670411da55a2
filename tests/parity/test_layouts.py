"""Every layout computes what one process computes: loss, gradients, weights and moments, in float64, below 1e-10."""

import functools

import pytest
from models import config

from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.schedule import schedules
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge, trace
from roots_dist.testing.world import on_world

STEPS = 3


def case(model: str, dp: int = 1, **changes: object):
    wanted = {(k if "__" in k else f"parallel__{k}"): v for k, v in changes.items()}
    name = ",".join(
        [model, *(f"{k.removeprefix('parallel__')}={v}" for k, v in wanted.items()), *([f"dp={dp}"] if dp > 1 else [])]
    )
    return pytest.param(config(model, **wanted), dp, id=name)


SCHEDULES = [
    dict(schedule=name, **(dict(virtual_stages=2) if schedule.virtual_stages else {}))
    for name, schedule in schedules.SCHEDULES.items()
]

CASES = [
    case("gpt", tp=2),
    case("gpt", tp=4),
    case("gpt", tp=2, sequence_parallel=True),
    case("gpt", tp=4, sequence_parallel=True),
    case("llama", tp=2),
    case("llama", tp=2, sequence_parallel=True),
    case("llama", tp=4),  # two key/value heads on four ranks
    case("llama", tp=4, sequence_parallel=True),
    case("bloom", tp=2, sequence_parallel=True),
    case("post", tp=2, sequence_parallel=True),
    *(case("gpt", pp=2, **s) for s in SCHEDULES),
    *(case("llama", pp=2, **s) for s in SCHEDULES),
    *(case("gpt", pp=3, model__layers=7, train__global_batch=6, **s) for s in SCHEDULES),
    *(case("gpt", pp=4, model__layers=8, **s) for s in SCHEDULES),
    *(case("llama", pp=4, model__layers=8, **s) for s in SCHEDULES[1:]),
    case("bloom", pp=2),
    case("post", pp=2),
    *(case("gpt", tp=2, pp=2, sequence_parallel=True, **s) for s in SCHEDULES),
    case("llama", tp=2, pp=2, sequence_parallel=True, schedule="zb-h1"),
    case("gpt", dp=2, zero_stage=0),
    case("gpt", dp=4, zero_stage=1),
    case("gpt", dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1),
    case("llama", dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1, schedule="zb-h1"),
    case("gpt", train__micro_batch=4),
    case("gpt", pp=2, train__micro_batch=2),
    case("gpt", virtual_stages=2, schedule="interleaved"),  # two stages in one process
    *(
        case("gpt", tp=2, pp=2, sequence_parallel=True, train__recompute=r, schedule="zb-h1")
        for r in ("selective", "full")
    ),
    *(case("llama", tp=2, train__recompute=r) for r in ("selective", "full")),
]


@functools.cache
def _alone(text: str) -> Trace:
    return merge(on_world(1, trace, Config.model_validate_json(text), 0, STEPS))


def alone(parallel: Config) -> Trace:
    """One process, one microbatch per step: nothing of the layout is left."""
    single = parallel.changed({**ONE_PROCESS, "train.micro_batch": 1, "train.recompute": "none"})
    return _alone(single.model_dump_json())


@pytest.mark.parametrize("parallel, dp", CASES)
def test_nothing_depends_on_the_layout(parallel, dp):
    size = parallel.parallel.tp * parallel.parallel.pp * dp
    rows = differences(alone(parallel), merge(on_world(size, trace, parallel, 0, STEPS)), FLOAT64_BOUNDS)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


def test_clipping_and_dropout_are_active():
    """Else the cases above prove less than they say."""
    plain = alone(config("gpt"))
    assert min(plain.norms) > 2 * config("gpt").optim.clip_grad
    without = alone(config("gpt", model__dropout=0.0, model__attention_dropout=0.0))
    assert abs(plain.losses[0] - without.losses[0]) > 1e-4
