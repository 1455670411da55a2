"""With train.exact no bit of a run depends on its layout: digests of loss, norm, weights, moments after every step."""

import functools
import json

import pytest
from models import config

from roots_dist.checks.checks import check_used
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError
from roots_dist.storage.checkpoint.same_model import refuse_other_bits
from roots_dist.testing.bits import Bits, first_difference, merge_bits, trace_bits
from roots_dist.testing.world import on_warm_world
from roots_dist.verify.exact import exact_row

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)]
"""Each with its virtual stages."""
TIMEOUT_S = 600
EXACT = dict(advanced__float64=False, train__micro_batch=1, optim__lr=1e-2)
"""Changes of every case, beside what models.py has: dropout and clipping act, and a step has several microbatches."""


def exact(model: str, degrees: tuple[int, int], **changes: object) -> Config:
    values = EXACT | {"train__exact": {"tensor": degrees[0], "data": degrees[1]}} | changes
    return config(model, **{key if "__" in key else f"parallel__{key}": value for key, value in values.items()})


@functools.cache
def _alone(config: Config, steps: int) -> list[Bits]:
    return merge_bits([trace_bits(0, 1, config, 0, steps)])


def of_layout(model: str, degrees: tuple[int, int], changes: dict[str, object]) -> tuple[Config, int]:
    """The config, and its number of ranks."""
    layout = exact(model, degrees, **{key: value for key, value in changes.items() if key != "dp"})
    ranks = layout.parallel.ranks_per_sample() * changes.get("dp", 1)
    assert not check_used(layout, ranks)
    return layout, ranks


def compare(model: str, degrees: tuple[int, int], steps: int, changes: dict[str, object]) -> None:
    """One process, and a layout: `dp` is a number of ranks, all other changes are keys."""
    layout, ranks = of_layout(model, degrees, changes)
    found = merge_bits(on_warm_world(ranks, trace_bits, layout, 0, steps, timeout=TIMEOUT_S))
    values = {key: changes[key] for key in ("train__precision", "train__steps") if key in changes}
    alone = _alone(exact(model, degrees, **values), steps)
    assert first_difference(alone, found) is None
    assert len(set(map(str, found))) == steps  # and each step changes something


SAMPLE = [
    ("gpt", (2, 2), dict(dp=2, tp=2, sequence_parallel=True, zero_stage=1)),
    ("llama", (4, 2), dict(tp=2, pp=2, schedule="zb-h1", train__precision="bf16")),
]
LAYOUTS = [
    dict(tp=2),
    dict(tp=4, sequence_parallel=True),
    dict(tp=4, train__recompute="full"),
    *(dict(pp=pp, schedule=name, virtual_stages=v) for pp in (2, 4) for name, v in SCHEDULES),
    dict(dp=2, zero_stage=0),
    dict(dp=4, zero_stage=2),
    dict(dp=4, zero_stage=3, train__recompute="selective"),
    dict(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1, schedule="zb-h1"),
]
WIDE = [dict(tp=8), dict(tp=8, sequence_parallel=True), dict(dp=8, zero_stage=3), dict(tp=4, dp=2, zero_stage=2)]
TABLE = [
    *((model, (4, 4), layout) for model in ("gpt", "llama", "bert", "t5", "electra") for layout in LAYOUTS),
    *(("llama", (8, 8), layout) for layout in WIDE),  # eight shards of two key/value heads
]


@pytest.mark.parametrize("model, degrees, changes", SAMPLE)
def test_no_bit_depends_on_the_layout(model, degrees, changes):
    compare(model, degrees, 2, changes)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model, degrees, changes", TABLE)
def test_no_bit_depends_on_any_layout(model, degrees, changes, precision):
    compare(model, degrees, 20, changes | {"train__precision": precision, "train__steps": 20})


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_bit_depends_on_resumes(precision, tmp_path):
    """One run over 1, 8, 2 and 4 processes, against one that was left alone."""
    steps, values = 3, {"train__precision": precision, "train__steps": 12}
    layouts = [
        {},
        dict(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1),
        dict(tp=2),
        dict(dp=2, pp=2, zero_stage=3, schedule="zb-h1"),
    ]
    found: list[Bits] = []
    for number, changes in enumerate(layouts):
        layout, ranks = of_layout("gpt", (4, 4), changes | values)
        source = str(tmp_path / str(number)) if number else None
        target, first = str(tmp_path / str(number + 1)), number * steps
        ranks_bits = on_warm_world(ranks, trace_bits, layout, first, first + steps, source, target, timeout=TIMEOUT_S)
        found += merge_bits(ranks_bits)
    assert first_difference(_alone(exact("gpt", (4, 4), **values), 12), found) is None


def test_a_differing_rank_is_named():
    truth = [{"loss": "a", "w[0:4] (weight)": "b"}, {"loss": "c", "w[0:4] (weight)": "d"}]
    other = [truth[0], truth[1] | {"w[0:4] (weight)": "e"}]
    row = exact_row("(weight)", truth, [{"steps": truth}, {"steps": other}])
    assert (row.passed, row.largest, row.where) == (False, 1, "step 1: w[0:4] (weight) on rank 1")
    assert exact_row("loss", truth, [{"steps": truth}, {"steps": other}]).passed


def test_a_resume_keeps_what_decides_the_bits(tmp_path):
    begun = exact("gpt", (4, 4))
    (tmp_path / "state.json").write_text(json.dumps({"config": begun.model_dump(mode="json"), "device": "cpu"}))
    refuse_other_bits(tmp_path, begun.changed({"parallel.tp": 2, "train.recompute": "full"}), "cpu")
    refuse_other_bits(tmp_path, begun.changed({"train.exact": None, "train.micro_batch": 2}), "cpu")
    for key, value in {"train.micro_batch": 2, "train.precision": "bf16", "train.exact": {"tensor": 2}}.items():
        with pytest.raises(ConfigError, match=key):
            refuse_other_bits(tmp_path, begun.changed({key: value}), "cpu")
    with pytest.raises(ConfigError, match="device"):
        refuse_other_bits(tmp_path, begun, "cuda")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train.exact": {"tensor": 3}}, "power of two"),
        ({"train.exact": {"tensor": 1, "data": 4}, "parallel.tp": 2}, "multiple of parallel.tp"),
        ({"train.exact": {"tensor": 16, "data": 1}}, "model.heads"),
        ({"train.exact": {"tensor": 4, "data": 16}}, "every batch a multiple"),
        ({"advanced.engine": "deepspeed"}, "advanced.engine"),
        ({"parallel.cp": 2}, "parallel.cp"),
        ({"finetune.strategy": "lora"}, "finetune.strategy"),
    ],
)
def test_what_cannot_be_exact_is_refused(changes, words):
    problems = check_used(exact("gpt", (4, 4)).changed(changes), 4)
    assert any(words in str(problem) for problem in problems), problems
