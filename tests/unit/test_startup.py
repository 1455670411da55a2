"""One rank's start costs the same in a world of 16,384 ranks as in a small one. What is counted are calls of functions
and of collectives, never seconds."""

import itertools
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from roots_dist.assembly.passes import inference_program, training_program
from roots_dist.assembly.run import build_run
from roots_dist.checks.checks import check_used
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.parallel.pipeline.partition import partition
from roots_dist.parallel.zero.ds_config import Mpu
from roots_dist.schedule.program import _violations, rank_program
from roots_dist.schedule.schedules import SCHEDULES, Shape
from roots_dist.world import mesh
from roots_dist.world.mesh import Mesh

MOST_CALLS = 12
"""Collective calls that make groups: four axes, four directions of messages, and ties."""
MODELS = {
    "gpt": {"model": {}},
    "electra": {
        "model": {"family": "electra", "segments": 2, "norm_position": "post"},
        "objective": {"name": "rtd"},
        "generator": {"hidden": 64, "heads": 16},
    },
    "t5": {"model": {"family": "t5", "positions": "relative"}, "objective": {"name": "spans"}},
}


def config_of(layout: Layout, model: str = "gpt", chunks: int = 1, **sections) -> Config:
    schedule = "interleaved" if chunks > 1 else "1f1b"
    tree = {
        "data": {"seq_length": 32},
        "train": {"global_batch": layout.dp * layout.pp * 2, "micro_batch": 1},
        "parallel": {"tp": layout.tp, "pp": layout.pp, "virtual_stages": chunks, "schedule": schedule},
        "objective": {},
    } | MODELS[model]
    tree["model"] = {"layers": layout.pp * chunks, "hidden": 64, "heads": 16, "vocab": 64} | tree["model"]
    return Config.model_validate(tree | sections)


def operations(work) -> int:
    """Functions that `work` calls, in Python and in C."""
    events = Counter()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        work()
    finally:
        sys.setprofile(None)
    return events["call"] + events["c_call"]


# ── the program ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pp", [0, 1, 31, 63])
def test_a_rank_asks_a_schedule_for_itself_and_its_neighbours_alone(name, pp, monkeypatch):
    """From the checks to the first step, in a world of 16,384 ranks."""
    layout, asked = Layout(tp=8, pp=64, dp=32), set()

    def spy(rank, *shape):
        asked.add(rank)
        return schedule.actions(rank, *shape)

    schedule = SCHEDULES[name]
    monkeypatch.setitem(SCHEDULES, name, replace(schedule, actions=spy))
    config = config_of(layout, chunks=2 if schedule.virtual_stages else 1).changed({"parallel.schedule": name})
    assert check_used(config, layout.world_size, rank=layout.rank(pp, 5, 3)) == []
    training_program(config, 128, pp)
    around = {(pp - 1) % 64, pp, (pp + 1) % 64}
    assert asked == (around if schedule.virtual_stages else {r for r in around if abs(r - pp) == 1 or r == pp})


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_program_costs_the_same_among_any_number_of_ranks_and_twice_for_twice_the_microbatches(name):
    chunks = 2 if SCHEDULES[name].virtual_stages else 1

    def cost(ranks: int, microbatches: int) -> int:
        shape = Shape(ranks, microbatches, chunks)
        _violations.cache_clear()
        return operations(lambda: rank_program(name, ranks // 2, shape))

    few = cost(8, 64)
    assert all(0.9 * few < cost(ranks, 64) < 1.1 * few for ranks in (16, 64))
    assert 1.8 * few < cost(8, 128) < 2.2 * few


def test_evaluation_costs_the_same_among_any_number_of_ranks():
    counts = {
        pp: operations(lambda pp=pp: inference_program(config_of(Layout(pp=pp)), 64, pp // 2)) for pp in (8, 64, 256)
    }
    own = {pp: operations(lambda pp=pp: config_of(Layout(pp=pp))) for pp in counts}
    assert len({counts[pp] - own[pp] for pp in counts}) == 1, counts


# ── the stages ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("per_stage", [2, 2.5, 3.2])
def test_a_partition_grows_at_most_with_the_square_of_the_model(per_stage):
    """Stages × pieces is the size of its table."""

    def cost(blocks: int) -> int:
        costs, required = [0.5, *[1.0] * blocks, 2.0], [False, *[True] * blocks, False]
        return operations(lambda: partition(costs, int(blocks / per_stage), required))

    assert cost(240) < 4.4 * cost(120)


def test_the_groups_of_an_axis_are_listed_without_looking_at_each_rank_in_turn():
    layout = Layout(tp=8, pp=16, dp=128)
    for axis, groups in (("tp", 2048), ("pp", 1024), ("dp", 128)):
        assert operations(lambda axis=axis: layout.groups(axis)) < 6 * groups + 100


# ── the groups ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def made(monkeypatch):
    """Members of each group that is created, in order; nothing is created."""
    groups = []
    monkeypatch.setattr(mesh.dist, "new_group", lambda ranks, **how: groups.append(tuple(ranks)) or object())
    return groups


def begin(config: Config, layout: Layout, rank: int) -> None:
    """Every group of a start: the axes, the messages, the ties, and those that DeepSpeed asks of us."""
    connected = Mesh.connect(layout, rank, torch.device("meta"))
    build_run(
        config, connected, make_engine=lambda config, connected, *_: Mpu(connected), objective=proof_objective(config)
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "layout, chunks",
    [
        (Layout(tp=8, pp=16, dp=128), 1),
        (Layout(tp=8, pp=4, dp=512), 2),
        (Layout(dp=16384), 1),
        (Layout(tp=16, dp=1024), 1),
        (Layout(tp=4, pp=8), 1),
    ],
    ids=str,
)
def test_a_rank_of_any_world_makes_a_handful_of_groups(model, layout, chunks, made):
    rank = layout.world_size * 5 // 8
    begin(config_of(layout, model, chunks), layout, rank)
    assert len(made) <= MOST_CALLS and all(rank in members for members in made), made


@pytest.mark.parametrize(
    "model, layout, chunks", [("electra", Layout(tp=2, pp=4, dp=2), 1), ("t5", Layout(2, 3, 1), 2)]
)
def test_all_ranks_make_equally_many_groups_and_the_members_of_each_make_it_as_the_same_one(
    model, layout, chunks, made
):
    """torch names a group by its members and by how many groups the process has: who has fewer waits for ever."""
    config = config_of(layout, model, chunks)
    by_rank = []
    for rank in range(layout.world_size):
        begin(config, layout, rank)
        by_rank.append(list(made))
        made.clear()
    for groups in itertools.zip_longest(*by_rank):
        assert all(groups[member] == members for members in groups for member in members), groups
    assert any(len(members) == 1 for groups in by_rank for members in groups), "some rank is in no tie"
