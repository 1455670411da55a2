"""Groups: who is with whom in any layout, and how many calls it takes to make them, at 16,384 ranks too."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from roots_dist.layout import Layout
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.world import mesh
from roots_dist.world.mesh import Axis, Mesh, make_axis
from roots_dist.world.words import MOST_BYTES, words_of


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), repeat=4)), ids=str)
def test_groups_of_an_axis_partition_the_world(sizes):
    layout = Layout(*sizes)
    for axis in ("tp", "cp", "pp", "dp", "dp_cp"):
        groups = layout.groups(axis)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(layout.world_size))
        assert groups == sorted(groups) and groups == [layout.along(axis, layout.place(ranks[0])) for ranks in groups]


def test_an_axis_of_one_rank_is_that_ranks():
    assert make_axis("cp", [[0], [1], [2]], 2, timedelta(seconds=1)) == Axis("cp", 1, 0, (2,))


def test_the_ranks_of_dp_and_cp_together_are_one_group():
    """It holds every context rank of every data rank, in their order; and a model is what tensor and pipeline ranks
    hold."""
    layout = Layout(dp=2, pp=2, tp=2, cp=2)
    place = layout.place(9)
    assert str(place) == "pp1 dp0 tp1" and str(layout.place(11)) == "pp1 dp0 cp1 tp1"
    assert layout.along("cp", place) == [9, 11] and layout.along("dp", place) == [9, 13]
    assert layout.along("dp_cp", place) == [9, 11, 13, 15] and layout.along("pp", place) == [1, 9]
    assert layout.model_groups() == [[first, first + 1, first + 8, first + 9] for first in (0, 2, 4, 6)]
    assert all(layout.rank(**layout.place(rank)._asdict()) == rank for rank in range(layout.world_size))


def test_shards_are_cut_over_neighbours_and_their_groups_hold_copies():
    layout = Layout(dp=4, cp=2, tp=2, zero_ranks=4)
    assert (layout.shard, layout.replica) == (4, 2)
    assert layout.groups("shard") == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert layout.groups("replica") == [[rank, rank + 8] for rank in range(8)]
    plain = Layout(dp=4, cp=2, tp=2)
    assert (plain.shard, plain.replica, plain.groups("shard")) == (8, 1, plain.groups("dp_cp"))


@pytest.fixture
def huge():
    """One of 16,384 ranks; the fake backend has no peers."""
    layout = Layout(dp=128, pp=16, tp=8)
    dist.init_process_group("fake", store=FakeStore(), rank=5000, world_size=layout.world_size)
    yield layout
    dist.destroy_process_group()


def test_a_rank_of_16384_makes_a_handful_of_groups(huge, monkeypatch):
    made, new_group = [], dist.new_group
    monkeypatch.setattr(mesh.dist, "new_group", lambda ranks, **how: made.append(ranks) or new_group(ranks, **how))
    whole = Mesh.connect(huge, 5000)
    assert [len(ranks) for ranks in made] == [8, 16, 128, 128] and all(5000 in ranks for ranks in made)
    assert (whole.tp.size, whole.pp.size, whole.dp.size, whole.model.size) == (8, 16, 128, 128)
    assert whole.tie_axis("tie", (0, 15)).size == 1 and made[-1] == [5000], "a rank in no group keeps its count even"


def test_second_threads_have_a_group_of_their_own(huge, monkeypatch):
    """In that of the main threads, messages of both would meet in any order."""
    main = Mesh.connect(huge, 5000)
    monkeypatch.setattr(mesh.dist, "new_group", lambda backend, **how: (backend, how["group_desc"]))
    background = main.for_background()
    assert background.world.group == ("gloo", mesh.BACKGROUND) and background.world.ranks == main.world.ranks


def test_a_communicator_that_can_be_split_is_split_once_for_each_axis(huge, monkeypatch):
    split = []
    monkeypatch.setattr(mesh, "_can_split", lambda: True)
    monkeypatch.setattr(mesh.dist, "split_group", lambda **how: split.append(how))
    whole = Mesh.connect(huge, 5000)
    assert [how["group_desc"] for how in split] == ["tp", "pp", "dp", "model"]
    assert [len(how["split_ranks"]) for how in split] == [2048, 1024, 128, 128]
    whole.tie_axis("tie", (0, 15))
    everyone = [rank for ranks in split[-1]["split_ranks"] for rank in ranks]
    assert sorted(everyone) == list(range(huge.world_size)), "a rank in no group keeps its count even"


def with_uneven_groups(rank: int, size: int) -> list[float]:
    """Ranks that were in no group of the first axis meet the others in the second."""
    import torch

    found = []
    for groups in ([[0, 1]], [[0, 2], [1, 3]], [[0, 1, 2, 3]], [[2], [3, 1]], [[0, 1], [2, 3]]):
        axis = make_axis("some", groups, rank, timedelta(seconds=60))
        found.append(axis.sum_(torch.tensor(10.0**rank)).item())
    return found


def test_ranks_that_were_left_out_still_meet_the_others_later():
    assert on_world(4, with_uneven_groups) == [
        [11, 101, 1111, 1, 11],
        [11, 1010, 1111, 1010, 11],
        [100, 101, 1111, 100, 1100],
        [1000, 1010, 1111, 1010, 1100],
    ]


def told(rank: int, size: int) -> list[str]:
    mesh = Mesh.connect(Layout(dp=size), rank)
    failure = SharedFailure(mesh)
    with failure.attempt("cannot save"):
        if rank == 1:
            raise OSError("\udcff is no folder")
    texts = ("of rank 0", "größer \udcff", "x" * 5000)
    return [*(words_of(mesh.world, 1, text if rank else "not read", mesh.device) for text in texts), failure.on_all()]


def test_all_ranks_are_told_the_text_of_one_cut_where_it_is_too_long():
    said = ["of rank 0", r"größer \udcff", "x" * MOST_BYTES, r"rank 1 (pp0 dp1 tp0): cannot save: \udcff is no folder"]
    assert on_warm_world(2, told) == [said, said]
    assert words_of(Mesh.single().world, 0, "alone", torch.device("cpu")) == "alone"
