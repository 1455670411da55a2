"""The cases of parity: MODELS × LAYOUTS, covered pairwise, and the one way to run a case and to compare it.

    MODELS, LAYOUTS --cover--> few cases with every pair of values --compare--> what one process computes, or it fails

A model that is added to models.py gets its cases by itself; so does an activation, or another word of the model's keys,
and a schedule that is added to SCHEDULES. Nothing is chosen by chance. `make test-full` runs the product itself.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from models import FINETUNED, MODELS, STRATEGIES, config

from roots_dist.checks.checks import check
from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.schedule.schedules import SCHEDULES
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge, trace
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.verify.verify import MATRIX

STEPS = 2
FLOAT32 = dict(advanced__float64=False, advanced__engine="deepspeed", optim__lr=1e-3)
"""DeepSpeed's, whose master weights are float32."""
MOST_RANKS = 8
COST = 4
"""What a case costs beside its ranks, in ranks: it is compared, and run in one process."""

# ── layouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TENSOR = {
    "": {},
    "tp=2": dict(tp=2),
    "tp=2,sp": dict(tp=2, sequence_parallel=True),
    "tp=4": dict(tp=4),
    "tp=4,sp": dict(tp=4, sequence_parallel=True),
}
CONTEXT = {"": {}, "cp=2": dict(cp=2)}
PIPELINE = {"": {}} | {f"pp={pp}": dict(pp=pp) for pp in (2, 3, 4)}
SCHEDULE = {"": {}} | {
    name: dict(schedule=name, virtual_stages=2 if schedule.virtual_stages else 1)
    for name, schedule in SCHEDULES.items()
}
DATA = {"": {}, "dp=2,zero=0": dict(dp=2, zero_stage=0), "dp=2,zero=1": dict(dp=2, zero_stage=1)}
RECOMPUTE = {"": {}} | {r: dict(train__recompute=r) for r in ("selective", "full")}
DIMENSIONS = (TENSOR, CONTEXT, PIPELINE, SCHEDULE, DATA, RECOMPUTE)
"""Name of a value -> the keys that it sets. The empty name is what one process has."""

Layout = tuple[str, ...]
"""The name of a value in each of DIMENSIONS."""
Pair = tuple[str, str]
ALL_MODELS = (*MODELS, *FINETUNED, *(f"bert-classify+{strategy}" for strategy in STRATEGIES))
FEATURES = ("family", "positions", "norm", "norm_position", "activation", "bias", "tied_embeddings", "embedding_norm")
"""Keys of a model whose values meet every value of a layout, on whichever model that has them."""


def changes(layout: Layout) -> dict[str, object]:
    return {key: value for names, name in zip(DIMENSIONS, layout) for key, value in names[name].items()}


def in_parallel(wanted: Mapping[str, object]) -> dict[str, object]:
    """Keys without a section are those of `parallel`; dp is none. Where tensor or context ranks and stages talk, two
    microbatches must do, if the schedule takes them: pipelines alone have eight."""
    found = {key if "__" in key else f"parallel__{key}": value for key, value in wanted.items() if key != "dp"}
    is_deep = wanted.get("pp", 1) > 1 and wanted.get("tp", 1) * wanted.get("cp", 1) > 1 == wanted.get("dp", 1)
    return {"train__global_batch": 4, **found} if is_deep else found


def num_ranks(layout: Layout) -> int:
    wanted = changes(layout)
    return math.prod(wanted.get(axis, 1) for axis in ("tp", "cp", "pp", "dp"))


LAYOUTS = tuple(
    layout
    for layout in itertools.product(*DIMENSIONS)
    if (layout[2] == "") == (layout[3] == "") and num_ranks(layout) <= MOST_RANKS
)
"""All that there are: a pipeline has a schedule, and a schedule a pipeline."""


def of_the_grid(values: Mapping[str, object]) -> Layout | None:
    """A row of `roots verify --matrix`, without its data ranks; None if it is none of LAYOUTS."""
    same = (
        layout
        for layout in LAYOUTS
        if layout[4:] == ("", "")
        and all(
            in_parallel(changes(layout)).get(key.replace(".", "__"), PLAIN[key]) == value
            for key, value in values.items()
            if key != "parallel.zero_stage"
        )
    )
    return next(same, None)


PLAIN = {f"parallel.{key}": value for key, value in Config().parallel.model_dump().items()}
GRID = frozenset(row[:4] for values in MATRIX if not values["parallel.zero_stage"] and (row := of_the_grid(values)))


# ── the cover ───────────────────────────────────────────────────────────────────────────────────────────────────────


def kinds(layout: Layout) -> set[str]:
    """What a layout has, whatever the degree."""
    tensor, context, _, schedule, data, recompute = layout
    in_tensor = "sp" if "sp" in tensor else tensor and "tp"
    return {*filter(None, (in_tensor, context and "cp", schedule, data and "dp", recompute and "recompute"))}


@functools.cache
def features(model: str) -> frozenset[str]:
    values = config(model).model
    grouped = {"grouped heads"} if values.num_kv_heads() < values.heads else set()
    return frozenset({f"{key}={getattr(values, key)}" for key in FEATURES} | grouped)


def pairs_of(model: str, layout: Layout) -> set[Pair]:
    """What a case shows: the model in every kind of layout, its features at every value, every two values together, and
    a row of the grid."""
    values = [name for name in layout if name]
    return {
        *([("grid", ",".join(layout[:4]))] if layout[:4] in GRID else []),
        *itertools.product([model], kinds(layout)),
        *itertools.product(features(model), values),
        *itertools.combinations(values, 2),
    }


def cover(models: Sequence[str], layouts: Sequence[Layout] = LAYOUTS) -> Iterator[tuple[str, Layout]]:
    """Few cases that together show every pair that a valid case can show.

    Greedy, model by model: each time the layout with the most new pairs for its processes. Where several have as many,
    the first one, and each model begins to count at another place, so that they do not all take the same. What two
    values of a layout show together is left to the models that follow, and in the end to each in turn.
    """
    shown: set[Pair] = set()
    last = [(model, False) for model in models] + [(model, True) for model in models]
    for number, (model, everything) in enumerate(last):
        first = 97 * number % len(layouts)
        left = {layout: pairs_of(model, layout) for layout in (*layouts[first:], *layouts[:first])}
        own = {model, *features(model)}
        while left := {layout: new for layout, pairs in left.items() if (new := pairs - shown)}:
            if not everything and not any(pair[0] in own for new in left.values() for pair in new):
                break
            best = max(left, key=lambda layout: len(left[layout]) / (COST + num_ranks(layout)))
            if fitted(model, changes(best)) is not None:
                yield model, best
                shown |= left[best]
                if everything:
                    break
            del left[best]


def fitted(model: str, wanted: Mapping[str, object]) -> Config | None:
    """The model in this layout, with the layers and sequences that it needs; None if the checks refuse it anyway."""
    dp = wanted.get("dp", 1)
    made = config(model, **in_parallel(wanted))
    for _ in range(9):
        wrong = {problem.key for problem in check(made, made.parallel.ranks_per_sample() * dp)}
        if not wrong:
            return made
        if "model.layers" in wrong:
            made = made.changed({"model.layers": made.model.layers + 1})
        elif wrong <= {"train.global_batch", "parallel.schedule"}:
            made = made.changed({"train.global_batch": made.train.global_batch + 2})
        else:
            return None
    return None


# ── cases ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    model: str
    config: Config
    dp: int = 1

    @property
    def size(self) -> int:
        return self.config.parallel.ranks_per_sample() * self.dp


def case(model: str, *, full: bool = False, **wanted: object):
    """One that is written down: a model, dp, keys of `parallel`, and others as `section__key`."""
    shown = [f"{key}={value}" for key, value in wanted.items() if key not in FLOAT32]
    made = Case(model, config(model, **in_parallel(wanted)), wanted.get("dp", 1))
    return pytest.param(made, id=",".join([model, *shown]), marks=[pytest.mark.full] if full else [])


@functools.cache
def the_cover() -> tuple[tuple[str, Layout], ...]:
    return tuple(cover(ALL_MODELS))


def models_of(*families: str) -> list[str]:
    """Names of the models of some families, each with all that learns."""
    return [model for model in ALL_MODELS if "+" not in model and config(model).model.family in families]


MODELS_WITH_STRATEGIES = [model for model in ALL_MODELS if "+" in model]


def covered(models: Sequence[str]) -> list:
    """The cases of the cover for some models."""
    return [_case_of(*found) for found in the_cover() if found[0] in models]


def product_of(models: Sequence[str]) -> list:
    """The rest of the whole product of models with tensor and pipeline layouts. It takes seconds to list."""
    return [
        _case_of(model, layout)
        for model, layout in itertools.product(models, LAYOUTS)
        if layout[4:] == ("", "") and (model, layout) not in the_cover() and fitted(model, changes(layout)) is not None
    ]


def _case_of(model: str, layout: Layout):
    wanted = changes(layout)
    name = ",".join([model, *filter(None, layout)])
    return pytest.param(Case(model, fitted(model, wanted), wanted.get("dp", 1)), id=name)


@functools.cache
def _alone(text: str, steps: int) -> Trace:
    return merge(on_warm_world(1, trace, Config.model_validate_json(text), 0, steps))


def alone(parallel: Config, steps: int = STEPS) -> Trace:
    """One process, one sequence at a time, by the reference engine: nothing of the layout is left."""
    single = {**ONE_PROCESS, "advanced.engine": "reference", "train.micro_batch": 1, "train.recompute": "none"}
    single["train.compile"] = False
    return _alone(parallel.changed(single).model_dump_json(), steps)


def compare(
    case: Case,
    bounds: Mapping[str, float] = FLOAT64_BOUNDS,
    steps: int = STEPS,
    trace: Callable[..., dict[str, Any]] = trace,
) -> None:
    """Fails with the table of differences. A DeepSpeed engine gets processes of its own."""
    world = on_world if case.config.advanced.engine == "deepspeed" else on_warm_world
    found = merge(world(case.size, trace, case.config, 0, steps, timeout=200))
    rows = differences(alone(case.config, steps), found, bounds)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))
