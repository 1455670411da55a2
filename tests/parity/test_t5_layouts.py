"""T5 in every layout computes what one process computes.

Equal in float64 to 1e-10, and in DeepSpeed's float32 to its bounds, wherever the border between encoder and decoder
falls.
"""

import pytest
from cases import FLOAT32, case, compare, covered, models_of, product_of

from roots_dist.learning.models import t5
from roots_dist.parallel.pipeline.partition import partition
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.verify.proofs import FLOAT32_BOUNDS

SP = dict(tp=2, sequence_parallel=True)
STEPS = 2
CASES = [
    *covered(models_of("t5")),
    case("t5", pp=3, train__global_batch=6, model__layers=5, model__decoder_layers=1, objective__mask_probability=0.15),
    case("t5-v1.1", pp=4, objective__mask_probability=0.15),
    case("t5", pp=4, model__layers=1, model__decoder_layers=6),
    case("t5", pp=2, train__recompute="full", schedule="zb-h1", **SP),
    case("t5", dp=2, pp=2, zero_stage=1, **SP),
    case("t5", train__micro_batch=4),
    case("t5-v1.1", pp=2, train__micro_batch=2),
    *(case("t5", objective__name="prefix", **s) for s in (SP, dict(pp=2, **SP), dict(pp=4))),
]


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_the_layout(case):
    compare(case, steps=STEPS)


def product() -> list:
    return product_of(models_of("t5"))


@pytest.mark.full
def test_nothing_depends_on_any_layout(case_of_the_product):
    compare(case_of_the_product, steps=STEPS)


@pytest.mark.parametrize(
    "case",
    [
        case("t5", dp=2, zero_stage=1, pp=2, **SP, **FLOAT32),
        case("t5", dp=2, zero_stage=2, pp=2, **FLOAT32),
        case("t5-v1.1", dp=2, zero_stage=3, **FLOAT32),
        case("t5", dp=2, zero_stage=3, pp=2, **FLOAT32),
        case("t5", dp=2, zero_stage=3, pp=2, full=True, **SP, **FLOAT32),
    ],
)
def test_zero_computes_what_one_process_computes(case):
    """Tables of distances and words that several pieces share among them."""
    compare(case, FLOAT32_BOUNDS, STEPS)


def test_the_border_between_the_stacks_falls_into_a_stage_and_between_two():
    """Else the cases above prove less than they say; and stages hand on what they did not make."""
    found = set()
    for parallel in (c.values[0].config for c in CASES if not c.marks):
        specs = t5.pieces(parallel, TensorParallel())
        runs = partition([p.cost for p in specs], parallel.num_stages(), [p.is_block for p in specs])
        bridge = [p.name for p in specs].index("bridge")
        (stage,) = (run for run in runs if bridge in run)
        found.add("between two" if bridge == stage[0] else "inside")
        found |= {"handed on"} if any(bridge < run[0] for run in runs[:-1]) else set()
    assert found == {"between two", "inside", "handed on"}
