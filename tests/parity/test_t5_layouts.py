"""T5 in every layout, and the rules that only two stacks have: each of them broken by hand must show.

Equal in float64 to 1e-10, and in DeepSpeed's float32 to its bounds, wherever the border between encoder and decoder
falls.
"""

import pytest
import t5_mutants
from cases import FLOAT32, alone, case, compare, covered
from models import config

from roots_dist.learning.models import t5
from roots_dist.parallel.pipeline.partition import partition
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.testing.parity import FLOAT64_BOUNDS, differences, merge
from roots_dist.testing.world import on_world
from roots_dist.verify.proofs import FLOAT32_BOUNDS

SP = dict(tp=2, sequence_parallel=True)
STEPS = 2
CASES = [
    *covered("t5"),
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


@pytest.mark.parametrize(
    "case",
    [
        case("t5", dp=2, zero_stage=1, pp=2, **SP, **FLOAT32),
        case("t5", dp=2, zero_stage=2, pp=2, **FLOAT32),
        case("t5-v1.1", dp=2, zero_stage=3, **FLOAT32),
        case("t5", dp=2, zero_stage=3, pp=2, **SP, **FLOAT32),
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


TABLE = "blocks.0.attention.relative.weight"
PP = dict(parallel__pp=2)
# mutant, model, layout, data ranks, and the gradient, in the order of the computation, that it must name first
BROKEN = [
    ("encoded_gradient_is_that_of_one_block", "t5", PP, 1, "embed.tokens.weight"),
    ("encoded_gradient_stays_on_the_last_stage", "t5-v1.1", dict(parallel__pp=4), 1, "embed.tokens.weight"),
    ("copies_of_tables_are_not_summed", "t5", dict(parallel__pp=3, train__global_batch=6), 1, f"encoder.{TABLE}"),
    ("copies_of_the_decoder_table_are_not_summed", "t5-v1.1", PP, 1, f"decoder.{TABLE}"),
    (
        "the_bridge_keeps_its_words_to_itself",
        "t5-v1.1",
        dict(parallel__pp=3, train__global_batch=6),
        1,
        "embed.tokens.weight",
    ),
    ("every_rank_has_the_table_of_the_first_heads", "t5", dict(parallel__tp=2), 1, None),
    ("dropout_in_the_mlp_is_keyed_on_local_channels", "t5", dict(parallel__tp=2), 1, None),
    ("sentinels_are_keyed_on_the_place_in_the_microbatch", "t5", dict(parallel__zero_stage=1), 2, None),
]


@pytest.mark.parametrize("mutant, model, layout, dp, where", BROKEN, ids=[f"{row[0]},{row[1]}" for row in BROKEN])
def test_a_broken_rule_shows(mutant, model, layout, dp, where):
    parallel = config(model, **layout)
    size = parallel.parallel.tp * parallel.parallel.pp * dp
    broken = merge(on_world(size, t5_mutants.mutated_trace, mutant, parallel, 0, STEPS))
    red = {row.what: row for row in differences(alone(parallel, STEPS), broken, FLOAT64_BOUNDS) if not row.passed}
    what = "gradients" if where else "loss"
    assert what in red, f"only {list(red)} went red"
    assert red[what].where.split(",")[0] == (where or "step 0")
    assert red[what].largest > 100 * red[what].bound


def test_every_mutant_is_used():
    written = {
        name for name, value in vars(t5_mutants).items() if callable(value) and value.__module__ == t5_mutants.__name__
    }
    assert {name for name in written if not name.startswith("_")} - {"mutated_trace"} == {row[0] for row in BROKEN}
