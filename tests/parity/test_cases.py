"""The cases of parity show what they should: every pair of values, every row of the grid, and whatever is added."""

import itertools

import cases
import pytest
import test_context
import test_deepspeed
import test_expert_parallel
import test_layouts
from cases import ALL_MODELS, DIMENSIONS, LAYOUTS, PLAIN, SCHEDULE, case, changes, cover, features, fitted, the_cover
from models import MODELS, OBJECTIVES, WORDS, config

from roots_dist.checks.checks import check
from roots_dist.config.activations import GATED
from roots_dist.learning.models.activations import FUNCTIONS
from roots_dist.schedule.schedules import SCHEDULES
from roots_dist.verify.verify import MATRIX


def exists(model: str, *values: str) -> bool:
    """Some layout with these values is one that the checks let pass."""
    return any(fitted(model, changes(layout)) for layout in LAYOUTS if {*values} <= {*layout})


@pytest.mark.parametrize("model", ALL_MODELS)
def test_every_model_is_one_that_could_be_trained(model):
    """Else the checks refuse it in every layout, and it has no cases."""
    assert not check(config(model), 1)


def test_every_model_meets_every_kind_of_layout():
    """Tensor ranks, sequence parallelism, context ranks, every schedule, data ranks, recomputation."""
    for model in ALL_MODELS:
        mine = [layout for found, layout in the_cover() if found == model]
        values = {value for layout in mine for value in layout}
        assert values & {"tp=2", "tp=4"} and values & {"tp=2,sp", "tp=4,sp"} and values >= {*SCHEDULES}, model
        assert (
            values & {"cp=2", "cp=4"} and values & {"dp=2,zero=0", "dp=2,zero=1"} and values & {"selective", "full"}
        ), model


def test_every_feature_of_a_model_meets_every_value_of_a_layout():
    shown = {(feature, value) for model, layout in the_cover() for feature in features(model) for value in layout}
    models_with = {
        feature: [m for m in ALL_MODELS if feature in features(m)] for m in ALL_MODELS for feature in features(m)
    }
    for feature, models in models_with.items():
        for value in (value for names in DIMENSIONS for value in names if value):
            assert (feature, value) in shown or not any(exists(model, value) for model in models), (feature, value)


def test_every_two_values_of_a_layout_meet():
    shown = {pair for _, layout in the_cover() for pair in itertools.combinations(layout, 2)}
    for first, second in itertools.combinations(DIMENSIONS, 2):
        for pair in itertools.product(filter(None, first), filter(None, second)):
            assert pair in shown or not any(exists(model, *pair) for model in ALL_MODELS), pair


@pytest.mark.parametrize("values", MATRIX, ids=lambda values: ",".join(map(str, values.values())))
def test_every_row_of_the_grid_runs(values):
    """The grid is that of `roots verify --matrix`, which is the table in docs/proof.md; without ZeRO in float64,
    with it in float32. Some rows of stages and experts, and four context ranks beside others, run in the whole suite
    alone."""
    stage = values["parallel.zero_stage"]
    of_experts = values["parallel.ep"] > 1
    files = [test_expert_parallel] if of_experts else [test_deepspeed] if stage else [test_layouts, test_context]
    of_eight = values["parallel.cp"] == 4 and values["parallel.tp"] * values["parallel.pp"] > 1
    found = [c.values[0] for file in files for c in file.CASES if of_experts or stage or of_eight or not c.marks]
    if not stage:
        found += [cases._case_of(*row).values[0] for row in the_cover()]

    def same(one: cases.Case) -> bool:
        key_of = {f"parallel.{key}": value for key, value in one.config.parallel.model_dump().items()}
        return all(key_of[key] == value for key, value in values.items() if stage or key != "parallel.zero_stage")

    assert any(same(one) and (one.dp == 2 or not stage or of_experts) for one in found)


@pytest.mark.parametrize("file", [test_deepspeed, test_expert_parallel])
def test_stages_and_experts_meet_every_axis_in_the_short_suite(file):
    short = [c.values[0].config.parallel for c in file.CASES if not c.marks]
    assert {p.zero_stage for p in short} >= {0, 1, 3} and {p.schedule for p in short} >= {"1f1b", "zb-h1"}
    for key in ("tp", "cp", "pp", "sequence_parallel"):
        assert any(getattr(p, key) > 1 or getattr(p, key) is True for p in short), key
    assert file is test_deepspeed or {p.ep for p in short} == {2, 4}


def test_a_model_that_is_added_brings_its_cases(monkeypatch):
    """And with it the grid, whatever else there is."""
    monkeypatch.setitem(MODELS, "tiny", MODELS["llama"] | {"layers": 2})
    found = [layout for model, layout in cover([*ALL_MODELS, "tiny"]) if model == "tiny"]
    assert {*SCHEDULES} <= {value for layout in found for value in layout}
    assert any("sp" in layout[0] for layout in found)


def test_a_word_that_no_model_says_has_a_model_of_its_own():
    for key, words in WORDS.items():
        said = {getattr(config(model).model, key) for model in MODELS}
        assert said == {*words}, key
    assert {*WORDS["activation"]} == {*FUNCTIONS, *GATED} - {"silu"}  # of swiglu


def test_a_schedule_that_is_added_brings_its_cases(monkeypatch):
    """As if interleaved were new: the layouts are made of the table."""
    assert [name for name in SCHEDULE if name] == list(SCHEDULES)
    without = [layout for layout in LAYOUTS if layout[3] != "interleaved"]
    less = list(cover(ALL_MODELS, without))
    assert not any(layout[3] == "interleaved" for _, layout in less)
    assert len(less) < len(the_cover())


def test_the_cover_is_small_and_always_the_same():
    assert list(cover(ALL_MODELS)) == list(the_cover())
    assert len(the_cover()) < len(ALL_MODELS) * len(LAYOUTS) / 40


def test_a_case_says_what_it_is():
    made = case("gpt", dp=2, tp=2, zero_stage=1)
    assert made.id == "gpt,dp=2,tp=2,zero_stage=1" and made.values[0].size == 4
    assert {key: PLAIN[key] for key in ("parallel.tp", "parallel.pp")} == {"parallel.tp": 1, "parallel.pp": 1}
    assert {*OBJECTIVES} <= {*ALL_MODELS}
