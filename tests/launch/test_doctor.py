"""The whole examination over real ranks: a healthy world, and each fault that it is there to find, one at a time.

Hosts are names that the test gives; faults are real where a test can make them (a mount, a busy core), else another
function measures.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import environ, roots
from patience import PATIENCE_S
from pydantic import TypeAdapter

from roots_dist.cluster_profile import Profile, Speed, read, write
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.layout import Layout
from roots_dist.runs.doctor import coordinator as coordinators
from roots_dist.runs.doctor import examine as examination
from roots_dist.runs.doctor import rank_facts as facts
from roots_dist.runs.doctor import speed
from roots_dist.runs.doctor.coordinator import Coordinator
from roots_dist.runs.doctor.examine import ExamineOptions, Probes, build_profile, examine
from roots_dist.runs.ranks.rendezvous import free_port, rendezvous
from roots_dist.testing.world import on_world

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CLONE_NEWNS, MS_RDONLY, MS_PRIVATE_ALL = 0x20000, 1, (1 << 18) | (1 << 14)
STUCK_S = 1000


def even(rank: int, device: torch.device, precision: str, quick: bool) -> Speed:
    """Machines that run tests are busy now and then: where speed is not the matter, all ranks are as fast."""
    return Speed(rank=rank, precision=precision, matmul_flops=1e11, copy_bytes_per_s=1e10, peak_flops=None)


def older(rank: int, device: torch.device, host: str):
    found = facts.gather(rank, device, host)
    return dataclasses.replace(found, versions={**found.versions, "torch": "2.12.0"}) if rank == 1 else found


def stuck(rank: int, device: torch.device, host: str):
    if rank == 1:
        time.sleep(STUCK_S)
    return facts.gather(rank, device, host)


def broken(rank: int, device: torch.device, host: str):
    if rank == 1:
        raise ValueError("the flux capacitor\nis empty")
    return facts.gather(rank, device, host)


def lame(rank: int, device: torch.device, precision: str, quick: bool) -> Speed:
    found = even(rank, device, precision, quick)
    return dataclasses.replace(found, matmul_flops=found.matmul_flops * (0.6 if rank == 2 else 1))


def mounted(folder: str, flags: int) -> None:
    """A file system of this rank's own over the folder, as a host has that mounts something else there."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    assert libc.mount(b"none", b"/", None, MS_PRIVATE_ALL, None) == 0
    assert libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, None) == 0


def visited(
    rank: int, size: int, port: int, hosts: str, options: ExamineOptions, change: dict, mount: int | None = None
) -> str:
    """The profile as JSON from rank 0. `change`: Tools with other functions. `mount`: flags, of rank 1's own mount."""
    dist.destroy_process_group()  # the test world's: the doctor makes its own
    if mount is not None and rank == 1:
        mounted(str(options.folder), mount)
    if change.get("facts") is stuck:  # it is waited for to the end; elsewhere a busy machine may need the time there is
        examination.FACTS_S, coordinators.SLACK_S = 4.0, 2.0
    world = World(rank, size, rank, size, "127.0.0.1", port, "test")
    begin = time.monotonic()
    coordinator = Coordinator(rendezvous(world, options.wait_s, hosts[rank]), rank, size)
    examine(coordinator, world, CPU, options, Probes(**{"host": hosts[rank], "speed": even, **change}))
    found = build_profile(coordinator, world, CPU, options, time.monotonic() - begin) if rank == 0 else None
    coordinator.leave()
    assert dist.is_initialized() is False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the test world closes one
    return TypeAdapter(Profile).dump_json(found).decode() if found else ""


def profile_of(
    hosts: str, options: ExamineOptions = ExamineOptions(quick=True), mount: int | None = None, **change
) -> Profile:
    answers = on_world(len(hosts), visited, free_port(), hosts, options, change, mount, timeout=PATIENCE_S)
    assert answers[1:] == [""] * (len(hosts) - 1)
    return TypeAdapter(Profile).validate_json(answers[0])


def ahead(seconds: float = 500.0) -> float:
    return time.time() + (seconds if os.environ["RANK"] == "1" else 0)


needs_root = pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="a mount needs root on Linux")


def test_a_healthy_world_of_two_hosts_has_no_findings_and_is_measured(tmp_path: Path):
    config = Config(parallel={"tp": 2}, track={"folder": str(tmp_path / "run")})
    found = profile_of("aabb", ExamineOptions(config, Layout(tp=2, dp=2), quick=True))
    assert found.findings == () and found.healthy and found.layout == "TP2×PP1×DP2"
    assert [(r.rank, r.host) for r in found.ranks] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert {r.versions["torch"] for r in found.ranks} == {torch.__version__}
    assert found.clock_offsets_s["a"] == 0.0 and abs(found.clock_offsets_s["b"]) < 5, "it is one machine"
    assert found.folder == str(tmp_path) and list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert all(one.trouble is None and one.bytes_per_s > 0 for one in found.wrote)
    rows = {(link.where, link.operation, link.bytes) for link in found.links}
    operations = ("all_reduce", "all_gather", "send")
    assert rows == {(w, o, b) for w in ("inside", "between") for o in operations for b in (2**12, 2**20)}
    assert all(link.groups == 2 == link.ranks and link.seconds > 0 for link in found.links)
    assert {link.slowest for link in found.links if link.where == "between"} <= {(0, 2), (1, 3)}
    assert found.seconds < PATIENCE_S


def test_a_rank_with_another_version_is_named_with_its_host():
    found = profile_of("aba", facts=older)
    assert [(f.check, f.where, f.found) for f in found.findings] == [("versions", "rank 1 (host b)", "torch 2.12.0")]
    assert not found.healthy


def test_a_rank_that_computes_slowly_is_named():
    found = profile_of("aab", speed=lame)
    assert [(f.check, f.where) for f in found.findings] == [("speed", "rank 2 (host b)")] and not found.healthy


def flops_by(monkeypatch, others: int) -> float:
    """FLOP/s as measured where `others` want the core too: after each slice of 10 products it is theirs for as long."""
    reads = itertools.count()

    def clock() -> float:
        products = next(reads)
        return 0.001 * (products + others * 10 * (products // 10))

    monkeypatch.setattr(time, "perf_counter", clock)
    return speed.measure(0, CPU, "fp32", quick=True).matmul_flops


def test_a_rank_that_shares_its_core_is_measured_as_slow_although_single_products_are_quick(monkeypatch):
    speeds = [
        Speed(rank=i, precision="fp32", matmul_flops=flops_by(monkeypatch, others), copy_bytes_per_s=1, peak_flops=None)
        for i, others in enumerate((0, 8))
    ]
    assert [f.where for f in speed.findings(speeds, {0: "a", 1: "b"})] == ["rank 1 (host b)"], speeds


def test_a_tensor_group_across_hosts_is_named():
    found = profile_of("aab", ExamineOptions(Config(), Layout(tp=3), quick=True, folder=Path("/tmp")))
    assert [(f.check, f.where) for f in found.findings] == [("placement", "ranks 0-1 (host a); 2 (host b)")]


def test_a_clock_that_is_wrong_is_named():
    found = profile_of("ab", now=ahead)
    assert [(f.check, f.where) for f in found.findings] == [("clocks", "host b")]
    assert found.clock_offsets_s["b"] == pytest.approx(500.0, abs=5)


def test_a_folder_that_is_a_file_is_refused_on_every_rank(tmp_path: Path):
    (tmp_path / "file").touch()
    found = profile_of("ab", ExamineOptions(quick=True, folder=tmp_path / "file"))
    assert [(f.where, f.found) for f in found.findings] == [
        ("ranks 0 (host a); 1 (host b)", f"cannot write to {tmp_path / 'file'} (it is a file)")
    ]


@needs_root
def test_a_folder_that_is_read_only_on_one_host_is_named(tmp_path: Path):
    found = profile_of("ab", ExamineOptions(quick=True, folder=tmp_path), mount=MS_RDONLY)
    assert [(f.where, f.found) for f in found.findings] == [
        ("rank 1 (host b)", f"cannot write to {tmp_path} (read-only file system)"),
        ("host b", f"does not see in {tmp_path} what rank 0 (host a) wrote there"),
    ]


@needs_root
def test_a_folder_that_is_another_one_on_each_host_is_named(tmp_path: Path):
    found = profile_of("ab", ExamineOptions(quick=True, folder=tmp_path), mount=0)
    assert [(f.where, f.found) for f in found.findings] == [
        ("host a", f"does not see in {tmp_path} what rank 1 (host b) wrote there"),
        ("host b", f"does not see in {tmp_path} what rank 0 (host a) wrote there"),
    ]


@pytest.mark.parametrize(
    "change, words", [(stuck, "facts: not done after 4 s"), (broken, "facts: ValueError: the flux capacitor")]
)
def test_a_rank_that_hangs_or_breaks_ends_the_examination_and_is_named(change, words):
    found = profile_of("aba", facts=change)
    assert [(f.where, f.found) for f in found.findings] == [("rank 1 (host b)", words)]
    assert [r.rank for r in found.ranks] == [0, 2] and found.links == () and found.seconds < STUCK_S


def test_the_bare_command_examines_this_machine_and_writes_a_profile_that_reads_back(tmp_path: Path):
    options = ["--quick", "--processes", "2", "--folder", str(tmp_path), "--json", str(tmp_path / "p.json")]
    command = [sys.executable, "-m", "roots_dist", "doctor", *options]
    variables = environ() | {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_S)
    found = read(tmp_path / "p.json")
    assert {f.check for f in found.findings} <= {"speed"}, "a machine that runs tests may be busy, nothing else"
    assert ran.returncode == (0 if found.healthy else 1), ran.stderr
    assert (
        ran.stdout.rstrip()
        .splitlines()[-1]
        .startswith("✓ 2 ranks on 1 host" if found.healthy else "✗ 2 ranks on 1 host")
    )
    assert "all_gather" in ran.stdout and "Traceback" not in ran.stderr and found.launcher == "roots doctor"
    write(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "p.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "again.json"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nope.yaml",), ["✗ nope.yaml", "Fix: "]),
        ((str(ROOT / "configs" / "quickstart.yaml"), "--processes", "3"), ["✗ world size = 3", "start 4 processes"]),
        (("--processes", "1", "--quick", "--json", "/proc/x.json"), ["✗ --json = '/proc/x.json'", "name another file"]),
    ],
)
def test_a_mistake_is_refused_with_exit_code_2(arguments, words):
    ran = roots("doctor", *arguments)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert all(word in ran.stderr for word in words), ran.stderr
