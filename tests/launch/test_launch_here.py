"""`roots launch` on this machine alone: which signals its launchers hear, which devices they take, and that nothing is
left behind."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from fakes import ROOT, furnish, notes, options_of, put
from patience import PATIENCE_S, comes_true

from roots_dist.cli.launch import command_for
from roots_dist.errors import UserError
from roots_dist.runs.launch.job import make
from roots_dist.runs.launch.launchers import LAUNCHERS
from roots_dist.runs.launch.render import TEMPLATES
from roots_dist.runs.launch.submit import write
from roots_dist.runs.ranks.local import SIGNALS, signals


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return furnish(tmp_path_factory.mktemp("here"))


def test_a_signal_that_is_ignored_here_is_not_listened_to_by_the_agent_of_this_machine(place, monkeypatch):
    """nohup, and shells for what they run in the background, ignore signals that torch elastic would end at."""
    monkeypatch.chdir(place)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert {"SIGHUP", "SIGTERM"} & {*signals().split(",")} == {"SIGTERM"}
        assert f"--signals-to-handle={signals()}" in run_here(place, "torchrun")
        script = (TEMPLATES / "slurm.sh").read_text()
        assert f"--signals-to-handle={SIGNALS}" in script
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("on", ["mpi", "deepspeed"])
def test_two_runs_on_one_machine_do_not_meet_each_other(place, monkeypatch, on):
    monkeypatch.chdir(place)
    options = options_of(on, **({"runner": "mpich"} if on == "mpi" else {}))
    jobs = [make(command_for, "small.yaml", (f"track.folder=runs/{name}",), options, place) for name in "ab"]
    texts = ["".join(LAUNCHERS[on](job, {}).files.values()) for job in jobs]
    ports = [re.search(r"^MASTER_PORT=(\d+)$", text, re.MULTILINE)[1] for text in texts]
    assert ports[0] != ports[1]


def run_here(place: Path, on: str, *overrides: str, environ: Mapping[str, str] | None = None, **options) -> list[str]:
    """What the script of a launcher gives to python, when it is run."""
    python = put(place, python=True) / "python"
    job = make(command_for, "small.yaml", overrides, options_of(on, python=str(python), **options), place)
    plan = LAUNCHERS[on](job, environ or {})
    write(plan)
    (place / "notes").unlink(missing_ok=True)
    subprocess.run(plan.command, cwd=place, env={"PATH": "/usr/bin:/bin", **(environ or {})}, check=True, timeout=60)
    (note,) = notes(place)
    return note["words"]


@pytest.mark.parametrize("shown, used", [("", ["0", "1"]), ("3,2,1", ["3", "2"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])])
def test_deepspeed_here_takes_the_devices_that_are_shown_to_it(place, monkeypatch, shown, used):
    monkeypatch.chdir(place)
    words = run_here(
        place, "deepspeed", "parallel.pp=1", gpus_per_node=2, environ={"CUDA_VISIBLE_DEVICES": shown} if shown else {}
    )
    (world,) = [word for word in words if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"localhost": used}
    job = make(command_for, "small.yaml", ("parallel.pp=1",), options_of("deepspeed", gpus_per_node=2), place)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES = '7': expected 2 devices"):
        LAUNCHERS["deepspeed"](job, {"CUDA_VISIBLE_DEVICES": "7"})


def test_deepspeed_here_ignores_the_devices_when_a_run_uses_none(place, monkeypatch):
    monkeypatch.chdir(place)
    job = make(command_for, "small.yaml", (), options_of("deepspeed"), place)
    assert LAUNCHERS["deepspeed"](job, {"CUDA_VISIBLE_DEVICES": "7"}).unset == ("CUDA_VISIBLE_DEVICES",)


def test_a_script_without_our_tool_refuses_fewer_devices_than_processes(place):
    environ = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "7", "PROCESSES_PER_NODE": "2"}
    command = ["bash", ROOT / "launch" / "deepspeed.sh", "small.yaml"]
    found = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and "CUDA_VISIBLE_DEVICES shows 1 GPUs, 2 are needed" in found.stderr


def test_deepspeed_here_ends_with_its_ranks_and_a_checkpoint_when_it_is_told_to(place):
    run = place / "runs" / "told"
    words = (
        "small.yaml",
        "--on",
        "deepspeed",
        "parallel.pp=1",
        "train.steps=100000",
        "checkpoint.every=0",
        f"track.folder={run}",
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "PYTHONPATH": str(ROOT)
    }
    command = [sys.executable, "-m", "roots_dist", "launch", *words]
    launcher = subprocess.Popen(
        command, cwd=place, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert comes_true(lambda: (run / "metrics.jsonl").exists() or launcher.poll() is not None)
        assert launcher.poll() is None
        launcher.terminate()
        text, _ = launcher.communicate(timeout=PATIENCE_S)
    finally:
        launcher.kill()
    assert (run / "ended.txt").read_text().startswith("stopped by SIGTERM after step "), text
    assert len([*(run / "checkpoints").glob("step_*")]) == 1
