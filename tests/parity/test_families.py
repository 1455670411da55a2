"""Every encoder and its tasks compute in every layout what they compute in one process: float64, below 1e-10.

T5 has test_t5_layouts.py; tasks of decoders are with the decoders, in test_layouts.py.
"""

import pytest
from cases import case, compare, covered, models_of, product_of

from roots_dist.assembly.rank_model import build_model
from roots_dist.layout import Layout
from roots_dist.world.mesh import SINGLE, Axis, Mesh

STEPS = 2
HEAVY_GENERATOR = dict(generator__hidden=32, generator__ffn=128, generator__layers=2, model__layers=1)
"""Else the generator is so light that both embeddings of ELECTRA are on the first stage, and nothing is tied."""
THREE_STAGES = dict(pp=3, train__global_batch=6, **HEAVY_GENERATOR)
TWO_STAGES = dict(pp=2, **HEAVY_GENERATOR)
CASES = [
    *covered(models_of("bert", "electra")),
    *(case(family, train__micro_batch=4) for family in ("bert", "roberta", "electra")),
    *(case(family, dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1) for family in ("bert", "electra")),
    case("electra", **THREE_STAGES),
    case("electra", tp=2, sequence_parallel=True, advanced__sinusoidal_init=True, **TWO_STAGES),
]


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_the_layout(case):
    compare(case, steps=STEPS)


def product() -> list:
    return product_of(models_of("bert", "electra"))


@pytest.mark.full
def test_nothing_depends_on_any_layout(case_of_the_product):
    compare(case_of_the_product, steps=STEPS)


@pytest.mark.parametrize("layout, words, positions", [(THREE_STAGES, (0, 1, 2), (0, 2)), (TWO_STAGES, (0, 1), (0, 1))])
def test_the_cases_of_electra_tie_words_over_three_stages_and_positions_over_two(layout, words, positions):
    (parallel,) = (made.config for made in case("electra", **layout).values)
    pp = Axis("pp", size=parallel.parallel.pp, ranks=tuple(range(parallel.parallel.pp)))
    single = Mesh.single()
    alone = dict.fromkeys(("tp", "dp", "cp", "dp_cp", "ep", "edp", "shard", "replica"), SINGLE)
    mesh = Mesh(Layout(pp=pp.size), 0, single.device, single.timeout, pp=pp, model=pp, world=pp, **alone)
    holders = build_model(parallel, mesh).holders
    assert holders["embed.tokens.weight"] == words and holders["embed.position_embedding"] == positions
