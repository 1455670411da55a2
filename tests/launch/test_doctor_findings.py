"""What the doctor says of answers that are laid before it: pure functions, every finding read as a user reads it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from threading import Event
from unittest import mock

import pytest
import torch

from roots_dist.cluster_profile import Finding, FolderAccess, Profile, RankFacts, Speed, format_ranks, read, write
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.errors import DataError
from roots_dist.layout import Layout
from roots_dist.runs.doctor import clocks, examine, links, speed
from roots_dist.runs.doctor import host_groups as placement
from roots_dist.runs.doctor import rank_facts as facts
from roots_dist.runs.doctor import shared_folder as folder
from roots_dist.runs.doctor.profile_table import lines
from roots_dist.runs.ranks.deadline import DeadlineExceeded, run_with_deadline
from roots_dist.testing.world import on_warm_world

HOSTS = ("a", "a", "b", "b")
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "code": "abc", "nccl": None}


def rank(number: int, **values) -> RankFacts:
    made = RankFacts(
        rank=number,
        host=HOSTS[number],
        device="cpu",
        versions=VERSIONS,
        cores=8,
        threads=4,
        memory_free=2**34,
        disk_free=2**36,
    )
    return replace(made, **values)


def answers(found) -> list[str]:
    return [str(finding) for finding in found]


def test_ranks_are_named_with_their_hosts():
    hosts = dict(enumerate(HOSTS))
    assert format_ranks([3], hosts) == "rank 3 (host b)"
    assert format_ranks([2, 0, 1], hosts) == "ranks 0-1 (host a); 2 (host b)"
    assert format_ranks([0, 1, 2, 5], {}) == "ranks 0-2, 5"


def test_equal_ranks_have_no_findings():
    ranks = [rank(i) for i in range(4)]
    assert answers(facts.versions(ranks)) == answers(facts.devices(ranks)) == answers(facts.check_space(ranks)) == []
    assert answers(facts.addresses(ranks, "gloo")) == []


def test_ranks_with_another_version_are_named_once_for_each_version():
    older = {**VERSIONS, "torch": "2.12.0"}
    ranks = [rank(0), rank(1, versions=older), rank(2), rank(3, versions={**VERSIONS, "code": "def"})]
    assert answers(facts.versions(ranks)) == [
        (
            "✗ rank 1 (host a): torch 2.12.0, expected 2.13.0 as on 3 of 4 ranks. Fix: install torch 2.13.0 "
            "there, or let all "
            "hosts use one environment on a shared folder."
        ),
        (
            "✗ rank 3 (host b): code def, expected abc as on 3 of 4 ranks. Fix: copy the same files of roots_dist "
            "there (git "
            "status says what was changed)."
        ),
    ]
    half = [rank(0), rank(1, versions=older), rank(2, versions=older), rank(3)]
    assert [f.where for f in facts.versions(half)] == ["ranks 1 (host a); 2 (host b)"], "of equally many rank 0's count"


def test_gpus_that_are_not_used_shared_or_of_another_kind_are_named():
    def gpu(number: int, name: str, kind: str = "NVIDIA H100") -> RankFacts:
        return rank(number, device=kind, gpu=name, gpus=2)

    found = list(facts.devices([gpu(0, "u0"), gpu(1, "u0"), gpu(2, "u0"), rank(3, gpus=2)]))
    assert [(f.where, f.serious) for f in found] == [
        ("rank 3 (host b)", True),
        ("ranks 0-1 (host a)", True),
        ("rank 3 (host b)", False),
    ], "the same id on another host is another GPU"
    assert "on one GPU, u0" in str(found[1])
    assert answers(facts.devices([rank(i, gpus=2) for i in range(4)])) == [], (
        "train.device=cpu on all ranks is a choice"
    )


def test_full_disks_and_small_shared_memory_are_named_by_host():
    full = [rank(0), rank(1), rank(2, disk_free=2**20), rank(3, disk_free=2**20)]
    assert answers(facts.check_space(full))[0].startswith(
        "✗ host b: 1 MiB left in its temporary folder, expected 1024 MiB or more."
    )
    docker = [rank(i, gpu=f"u{i}", shared_memory_free=2**26) for i in range(4)]
    assert [f.where for f in facts.check_space(docker)] == ["host a", "host b"]
    assert answers(facts.check_space([rank(i, shared_memory_free=2**26) for i in range(4)])) == [], (
        "gloo has no use for it"
    )


def test_a_host_whose_name_leads_to_itself_is_named_where_that_matters():
    ranks = [rank(0, address="10.0.0.1"), rank(1, address="10.0.0.1"), rank(2, address="127.0.1.1"), rank(3)]
    assert [f.where for f in facts.addresses(ranks, "gloo")] == ["host b"]
    assert answers(facts.addresses(ranks, "nccl")) == answers(facts.addresses(ranks[2:], "gloo")) == []


def test_the_code_hash_sees_content_and_names_and_nothing_else(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x.py").write_text("a = 1\n")
    (tmp_path / "two" / "notes.txt").write_text("not code")
    before = facts.code_hash(tmp_path / "one")
    assert before == facts.code_hash(tmp_path / "two") and len(before) == 12
    (tmp_path / "two" / "sub" / "x.py").rename(tmp_path / "two" / "sub" / "y.py")
    (tmp_path / "one" / "sub" / "x.py").write_text("a = 2\n")
    assert len({before, facts.code_hash(tmp_path / "one"), facts.code_hash(tmp_path / "two")}) == 3


def test_the_code_hash_of_a_rank_covers_the_whole_package():
    import roots_dist

    assert Path(roots_dist.__file__).resolve().parent == facts.PACKAGE


def test_a_tensor_group_on_two_hosts_is_named_and_one_on_a_host_is_not():
    hosts = dict(enumerate(HOSTS))
    assert answers(placement.crossings(Layout(tp=2, pp=2), hosts)) == []
    assert answers(placement.crossings(Layout(tp=2, dp=2), {0: "a", 1: "b", 2: "b", 3: "b"})) == [
        (
            "✗ ranks 0 (host a); 1 (host b): a tensor group of TP2×PP1×DP2 across hosts, expected its 2 ranks on "
            "one host. Fix: "
            "start a multiple of 2 ranks on every host, numbered consecutively per host, or lower parallel.tp."
        )
    ]
    assert answers(placement.crossings(Layout(dp=4, ep=2), {0: "a", 1: "b", 2: "b", 3: "a"})) != []
    assert answers(placement.crossings(Layout(dp=4, ep=4), {0: "a", 1: "a", 2: "b", 3: "b"})) == [], "no host has room"
    in_nodes = Layout(dp=4, zero_ranks=2)
    assert answers(placement.crossings(in_nodes, {0: "a", 1: "a", 2: "b", 3: "b"})) == []
    (first, _) = answers(placement.crossings(in_nodes, {0: "a", 1: "b", 2: "b", 3: "a"}))
    assert "a shard group of TP1×PP1×DP4 across hosts" in first and "or lower parallel.zero_ranks" in first
    many = list(placement.crossings(Layout(tp=2, dp=32), {i: "ab"[i % 2] for i in range(64)}))
    assert len(many) == placement.MOST_SHOWN and "one of 32 such groups" in str(many[0])


def test_groups_across_hosts_take_one_rank_of_each():
    assert placement.by_host("aabb") == [[0, 1], [2, 3]] == placement.by_host(["x", "x", "y", "y"])
    assert placement.across_hosts("aabb") == [[0, 2], [1, 3]]
    assert placement.across_hosts("abaa") == [[0, 1], [2], [3]]


def test_a_wrong_clock_is_named_and_rank_0_may_be_the_wrong_one():
    assert answers(clocks.findings({"a": 0.0, "b": 0.02, "c": -0.9})) == []
    assert [str(f)[:34] for f in clocks.findings({"a": 0.0, "b": 7.2, "c": 0.1})] == [
        "✗ host b: clock 7.1 s ahead, expec"
    ]
    assert [f.where for f in clocks.findings({"a": 0.0, "b": 60.0, "c": 60.1})] == ["host a"]


def test_a_rank_below_seven_tenths_of_the_median_is_slow():
    def of(*flops: float) -> list[Speed]:
        return [
            Speed(rank=i, precision="fp32", matmul_flops=f, copy_bytes_per_s=1.0, peak_flops=None)
            for i, f in enumerate(flops)
        ]

    hosts = dict(enumerate(HOSTS))
    assert answers(speed.findings(of(1e11, 0.9e11, 1.1e11, 0.8e11), hosts)) == []
    (slow,) = answers(speed.findings(of(1e11, 1e11, 1e11, 0.5e11), hosts))
    assert slow.startswith(
        "✗ rank 3 (host b): slow, 50 GFLOP/s in fp32 products, 50% of the median, expected 70% of 100 GFLOP/s"
    )


def test_what_the_shared_folder_lacks_is_named():
    hosts = dict(enumerate(HOSTS))
    good = [FolderAccess(rank=i, trouble=None, bytes_per_s=1e8, free=10 * 2**30) for i in range(4)]
    bad = [
        *good[:2],
        *(FolderAccess(rank=i, trouble="read-only file system", bytes_per_s=None, free=None) for i in (2, 3)),
    ]
    path = Path("/shared")
    assert answers(folder.findings(path, good, {0: [], 2: []}, hosts, checkpoint=2**30)) == []
    (unwritable,) = answers(folder.findings(path, bad, {0: [], 2: []}, hosts, None))
    assert unwritable.startswith(
        "✗ ranks 2-3 (host b): cannot write to /shared (read-only file system), expected every rank"
    )
    (unseen,) = answers(folder.findings(path, good, {0: [], 2: [0, 1]}, hosts, None))
    assert unseen.startswith("✗ host b: does not see in /shared what ranks 0-1 (host a) wrote there")
    (small,) = answers(folder.findings(path, good, {0: [], 2: []}, hosts, checkpoint=20 * 2**30))
    assert small.startswith("✗ folder /shared: 10.0 GiB free, expected space for one checkpoint of 20.0 GiB")


def test_the_runs_folder_is_tried_where_it_is_going_to_be(tmp_path: Path):
    assert folder.place(None, tmp_path / "not" / "yet") == tmp_path
    assert folder.place(tmp_path / "typo", tmp_path) == tmp_path / "typo", "what was asked for is taken at its word"
    assert folder.place(None, None) is None


def test_links_are_merged_by_group_and_the_slowest_group_is_kept():
    samples = [
        links.Sample("between", "all_reduce", (0, 2), 1000, 1e-3),
        links.Sample("between", "all_reduce", (0, 2), 1000, 2e-3),
        links.Sample("between", "all_reduce", (1, 3), 1000, 8e-3),
    ]
    (link,) = links.merge(samples)
    assert (link.ranks, link.groups, link.seconds, link.slowest, link.slowest_seconds) == (2, 2, 8e-3, (1, 3), 8e-3)
    assert link.bus_bytes_per_s == pytest.approx(1000 / 8e-3 * 2 * (2 - 1) / 2)
    (gather,) = links.merge([links.Sample("inside", "all_gather", (0, 1, 2, 3), 1000, 1e-3)])
    assert gather.bus_bytes_per_s == pytest.approx(1e6 * 3 / 4)


def test_a_pair_with_a_slow_link_is_named_beside_three_others():
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    times = [1e-3, 1.1e-3, 9e-3, 0.9e-3]
    samples = [links.Sample("inside", "send", p, size, t) for p, t in zip(pairs, times) for size in (8, 2**20)]
    (slow,) = links.findings(samples, dict.fromkeys(range(8), "a"))
    assert slow.where == "ranks 4-5 (host a)" and not slow.serious and str(slow).startswith("!")
    assert list(links.findings(samples[:4], {})) == [], "of two nobody knows which is usual"


def profile(*findings: Finding) -> Profile:
    speeds = (Speed(rank=0, precision="fp32", matmul_flops=1e11, copy_bytes_per_s=3e10, peak_flops=1.1e11),)
    samples = [links.Sample("inside", "send", (0, 1), size, 1e-3) for size in (2**12, 2**22)]
    return Profile(
        when="2026-01-02T03:04:05+00:00",
        seconds=1.5,
        launcher="Slurm",
        backend="gloo",
        world_size=2,
        layout="TP2×PP1×DP1",
        ranks=(rank(0), rank(1, memory_free=None, gpu="u1")),
        clock_offsets_s={"a": 0.0},
        folder="/shared",
        wrote=(
            FolderAccess(rank=0, trouble=None, bytes_per_s=1e8, free=5),
            FolderAccess(rank=1, trouble="full", bytes_per_s=None, free=None),
        ),
        speeds=speeds,
        links=tuple(links.merge(samples)),
        findings=findings,
    )


def test_a_profile_reads_back_as_it_was_and_nothing_else_does(tmp_path: Path):
    made = profile(Finding(check="speed", where="rank 1", found="slow", expected="fast", fix="hurry"))
    write(made, tmp_path / "new" / "cluster.json")
    assert read(tmp_path / "new" / "cluster.json") == made
    (tmp_path / "other.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="expected what roots doctor --json wrote .* Fix: write it on the cluster with"):
        read(tmp_path / "other.json")
    write(replace(made, format=2), tmp_path / "later.json")
    with pytest.raises(DataError, match="expected format 1, found 2"):
        read(tmp_path / "later.json")


def test_only_serious_findings_make_a_world_unhealthy():
    warning = Finding(check="links", where="x", found="y", expected="z", fix="w", serious=False)
    assert (
        profile().healthy and profile(warning).healthy and not profile(warning, replace(warning, serious=True)).healthy
    )
    ends = [list(lines(profile(*findings)))[-1] for findings in ((), (warning,), (replace(warning, serious=True),))]
    assert [end[0] for end in ends] == ["✓", "✓", "✗"] and "1 finding to fix" in ends[2]


def test_work_has_its_result_its_error_or_an_end():
    assert run_with_deadline(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_with_deadline(5, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match="its own"):
        run_with_deadline(5, lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    over = Event()
    with pytest.raises(DeadlineExceeded, match="not done after 0.2 s"):
        run_with_deadline(0.2, over.wait)  # without an end it would wait until pytest ends it
    over.set()


class Rounds:
    """A coordinator that notes which rounds there are."""

    rank, store, thread_is_stuck = 0, None, False

    def __init__(self):
        self.fixes = {}

    def run_round(self, name, seconds, work, silence="", fix=""):
        self.fixes[name] = fix


@pytest.mark.parametrize(
    "kind, changes, is_tried",
    [
        ("cuda", {"checkpoint.every": 5}, True),
        ("cuda", None, True),
        ("cuda", {"checkpoint.every": 5, "checkpoint.asynchronous": False}, False),
        ("cpu", {"checkpoint.every": 5}, False),
    ],
)
def test_gpus_that_save_in_the_background_have_to_meet_over_gloo_too(kind, changes, is_tried, monkeypatch):
    """NCCL connected, and the first checkpoint waited for a host name that leads to 127.0.0.1."""
    rounds, device = Rounds(), torch.device(kind)
    monkeypatch.setattr(examine, "_with_deadline", lambda *_: None)
    options = examine.ExamineOptions(None if changes is None else Config().changed(changes))
    examine._links(rounds, World(0, 2, 0, 2, "a", 1, "torchrun"), device, options, ["a", "b"])
    assert ("GLOO_SOCKET_IFNAME" in rounds.fixes.get("background saves", "")) == is_tried
    assert list(rounds.fixes) == ["join", *["background saves"] * is_tried, "links"]


def meets(rank: int, size: int, interface: str) -> str:
    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": interface}):
        try:
            examine.meet_over_gloo(size)
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_network_interface_that_is_not_there_keeps_gloo_apart():
    assert on_warm_world(2, meets, "lo") == ["", ""]
    assert all("nowhere" in said for said in on_warm_world(2, meets, "nowhere"))
