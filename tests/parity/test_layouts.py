"""Every layout computes what one process computes: loss, gradients, weights and moments, in float64, below 1e-10."""

import pytest
from cases import alone, case, compare, covered, models_of, product_of
from models import config

CASES = [
    *covered(models_of("gpt")),
    case("llama", tp=2, model__kv_heads=1),  # one key/value head on two ranks
    case(
        "llama", tp=4, sequence_parallel=True, model__attention_dropout=0.1
    ),  # two on four ranks; dropped by query head
    case("gpt", pp=3, model__layers=7, train__global_batch=6, schedule="interleaved", virtual_stages=2),
    case("gpt", pp=3, model__layers=7, train__global_batch=6, schedule="zb-h1"),
    case("gpt", virtual_stages=2, schedule="interleaved"),  # two stages in one process
    case("gpt", dp=4, zero_stage=1),
    case("gpt", dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1),
    case("llama", dp=2, cp=2, zero_stage=3, zero_ranks=2),  # shards over context ranks, copies over data ranks
    pytest.param(*case("bloom", dp=4, pp=2, zero_stage=2, zero_ranks=2).values, id="hsdp-pp", marks=pytest.mark.full),
    pytest.param(*case("mixtral", dp=4, zero_stage=3, zero_ranks=2).values, id="hsdp-experts", marks=pytest.mark.full),
    case(
        "llama", dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1, schedule="zb-h1", model__kv_heads=1
    ),  # both tensor ranks put off a part of one head's gradient
    case("gpt", train__micro_batch=4),
    case("gpt", pp=2, train__micro_batch=2),
    *(
        case("gpt", tp=2, pp=2, sequence_parallel=True, train__recompute=r, schedule="zb-h1")
        for r in ("selective", "full")
    ),
    *(case("llama", tp=2, train__recompute=r) for r in ("selective", "full")),
    case("gpt", tp=2, pp=2, sequence_parallel=True, objective__reset_at_documents=True),
    case("bloom", tp=2, pp=2, objective__reset_at_documents=True),
    case("llama", tp=2, sequence_parallel=True, objective__reset_at_documents=True),
]


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_the_layout(case):
    compare(case)


def product() -> list:
    return product_of(models_of("gpt"))


@pytest.mark.full
def test_nothing_depends_on_any_layout(case_of_the_product):
    compare(case_of_the_product)


def test_clipping_and_dropout_are_active():
    """Else the cases above prove less than they say."""
    plain = alone(config("gpt"))
    assert min(plain.norms) > 2 * config("gpt").optim.clip_grad
    without = alone(config("gpt", model__dropout=0.0, model__attention_dropout=0.0))
    assert abs(plain.losses[0] - without.losses[0]) > 1e-4
