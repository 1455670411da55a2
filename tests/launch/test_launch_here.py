"""`roots launch` on this machine alone: which signals its launchers hear, which devices they take, and that nothing is left
behind."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import ROOT
from test_launch_plans import furnish

from roots_dist.cli.launch import verb_for
from roots_dist.errors import UserError
from roots_dist.runs.launch.job import Wishes, make
from roots_dist.runs.launch.launchers import LAUNCHERS
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
        job = make(verb_for, "small.yaml", (), Wishes(on="torchrun"), place)
        assert f"--signals-to-handle={signals()}" in LAUNCHERS["torchrun"](job, {}).command
        (script,) = (text for path, text in LAUNCHERS["slurm"](job, {}).files.items() if path.name == "slurm.sh")
        assert f"--signals-to-handle={SIGNALS}" in script
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "wishes", [{"on": "mpi", "runner": "mpich"}, {"on": "mpi", "runner": "openmpi"}, {"on": "deepspeed"}], ids=str
)
def test_two_runs_on_one_machine_do_not_meet_each_other(place, monkeypatch, wishes):
    monkeypatch.chdir(place)
    plans = [
        LAUNCHERS[wishes["on"]](
            make(verb_for, "small.yaml", (f"track.folder=runs/{name}",), Wishes(**wishes), place), {}
        )
        for name in "ab"
    ]
    ports = [
        {word for word in (*plan.command, *plan.variables.items()) if "master_port" in str(word).lower()}
        for plan in plans
    ]
    assert all(ports) and not ports[0] & {word for word in ports[1] if word != "MASTER_PORT"}


@pytest.mark.parametrize("shown, used", [("", [0, 1]), ("3,2,1", ["3", "2"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])])
def test_deepspeed_here_takes_the_devices_that_are_shown_to_it(place, monkeypatch, shown, used):
    monkeypatch.chdir(place)
    job = make(verb_for, "small.yaml", ("parallel.pp=1",), Wishes(on="deepspeed", per_node=2, gpus=True), place)
    (world,) = [
        word
        for word in LAUNCHERS["deepspeed"](job, {"CUDA_VISIBLE_DEVICES": shown}).command
        if word.startswith("--world_info=")
    ]
    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"localhost": used}
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES = '7': expected 2 devices"):
        LAUNCHERS["deepspeed"](job, {"CUDA_VISIBLE_DEVICES": "7"})


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
        deadline = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        launcher.terminate()
        text, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert (run / "ended.txt").read_text().startswith("stopped by SIGTERM after step "), text
    assert len([*(run / "checkpoints").glob("step_*")]) == 1
