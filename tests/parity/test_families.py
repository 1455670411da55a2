"""Every encoder and objective computes in every layout what it computes in one process: float64, below 1e-10.

T5 has test_t5_layouts.py.
"""

import functools

import pytest
from models import FINETUNED, config

from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge, trace
from roots_dist.testing.world import on_world

STEPS = 2


def case(family: str, dp: int = 1, **changes: object):
    wanted = {(k if "__" in k else f"parallel__{k}"): v for k, v in changes.items()}
    name = ",".join(
        [family, *(f"{k.removeprefix('parallel__')}={v}" for k, v in wanted.items()), *([f"dp={dp}"] if dp > 1 else [])]
    )
    return pytest.param(config(family, **wanted), dp, id=name)


FAMILIES = ("bert", "roberta", "electra")
CASES = [
    *(case(family, tp=2) for family in FAMILIES),
    *(case(family, tp=2, sequence_parallel=True) for family in FAMILIES),
    *(case(family, pp=2) for family in FAMILIES),
    *(case(family, tp=2, pp=2, sequence_parallel=True, schedule="zb-h1") for family in FAMILIES),
    *(case(family, dp=2, zero_stage=1) for family in FAMILIES),
    *(case(family, dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1) for family in ("bert", "electra")),
    *(case(family, tp=4, sequence_parallel=True) for family in ("bert", "electra")),
    *(case(family, pp=2, schedule="interleaved", virtual_stages=2) for family in ("bert", "electra")),
    case("electra", pp=3, train__global_batch=6),
    case("electra", pp=4),
    case("electra", tp=2, pp=2, sequence_parallel=True, advanced__sinusoidal_init=True),  # the table is on two stages
    *(case("bert", tp=2, pp=2, train__recompute=r) for r in ("selective", "full")),
    *(case(family, train__micro_batch=4) for family in FAMILIES),
    *(case(task, tp=2) for task in FINETUNED),
    *(case(task, pp=2) for task in FINETUNED),
    *(case(task, tp=2, pp=2, sequence_parallel=True) for task in FINETUNED),
    case("bert-classify", dp=2, tp=2, sequence_parallel=True, zero_stage=1),
    case("gpt", tp=2, pp=2, sequence_parallel=True, objective__reset_at_documents=True),
    case("bloom", tp=2, pp=2, objective__reset_at_documents=True),
    case("llama", tp=2, sequence_parallel=True, objective__reset_at_documents=True),
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
