"""A run that is told to stop: it ends at a step's border with a checkpoint, on all ranks, says so, and goes on from
there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import environ, roots

from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.learning.data.store import Writer
from roots_dist.runs.train.stop_signal import read_end

ROOT = Path(__file__).parents[2]
LIMIT_S = 250


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("stop")
    with Writer(place / "text", np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(0).integers(0, 61, 4000).astype("<u2"))
        writer.commit()
    config = {
        "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 61},
        "data": {"train": str(place / "text"), "seq_length": 16},
        "train": {"steps": 100_000, "global_batch": 4, "micro_batch": 4, "device": "cpu", "log_every": 1},
        "optim": {"lr": 1e-3, "lr_schedule": "constant", "warmup_steps": 0},
        "checkpoint": {"every": 0},
        "track": {"folder": str(place / "run"), "wandb": "disabled"},
    }
    (place / "run.yaml").write_text(to_yaml(Config.model_validate(config)))
    return place


def start(place: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "roots_dist", "train", str(place / "run.yaml"), *overrides]
    return subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/train"] for row in rows if "loss/train" in row}


def until_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not (folder / "metrics.jsonl").exists() or max(losses(folder), default=0) < step:
        assert time.monotonic() < deadline, "the run took no steps"
        time.sleep(0.05)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def finish(run: subprocess.Popen) -> tuple[int, str]:
    try:
        out, err = run.communicate(timeout=LIMIT_S)
    finally:
        run.kill()
    return run.returncode, out + err


@pytest.mark.parametrize(
    "whom, number",
    [
        ("one rank", signal.SIGUSR1),
        ("the launcher", signal.SIGTERM),
        pytest.param("the launcher", signal.SIGUSR1, marks=pytest.mark.full),
    ],
)
def test_a_signal_ends_all_ranks_after_a_step_with_a_checkpoint_from_which_the_run_goes_on(
    place, tmp_path, whom, number
):
    folder = tmp_path / "run"
    run = start(place, "parallel.tp=2", f"track.folder={folder}")
    until_step(folder, 5)
    assert not (folder / "ended.txt").exists()
    os.kill(run.pid if whom == "the launcher" else ranks_of(run)[-1], number)
    code, said = finish(run)
    assert code == 128 + number, said
    ended = re.fullmatch(rf"stopped by {number.name} after step (\d+)", read_end(folder / "ended.txt"))
    assert ended and f"{ended[0]}, with a checkpoint" in said and "✗" not in said and "│" not in said
    step = int(ended[1])
    assert max(losses(folder)) == step
    assert [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith(".")] == [
        f"step_{step:08d}"
    ]
    if whom != "one rank":
        return
    whole = tmp_path / "whole"
    for where in (folder, whole):
        again = roots("train", str(place / "run.yaml"), f"track.folder={where}", f"train.steps={step + 10}")
        assert again.returncode == 0, again.stderr
    assert read_end(folder / "ended.txt") == f"finished after step {step + 10}"
    once, twice = losses(whole), losses(folder)
    assert len(once) == step + 10 and once.keys() == twice.keys()
    assert max(abs(once[i] - twice[i]) for i in once) < 1e-5


def test_a_rank_whose_peer_has_failed_does_not_wait_for_a_step_that_will_not_come(tmp_path):
    """Even with its main thread deaf in C, as in a collective."""
    code = f"""
import ctypes, os, signal, sys
from pathlib import Path
from roots_dist.runs.train.stop_signal import catch_stop_signals, record_end
folder = Path({str(tmp_path)!r})
with catch_stop_signals(folder) as stop:
    os.kill(os.getpid(), signal.SIGUSR1)
    while not stop.signal:
        pass
    print("goes on", flush=True)
    record_end(folder, "failed: rank 1 (pp0 dp0 tp1), node n1: no more")
    if os.fork() == 0:
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    libc = ctypes.CDLL(None)
    while True:
        libc.pause()  # begins again after each signal, and Python hears of none
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (found.returncode, found.stdout) == (128 + signal.SIGTERM, "goes on\n"), found.stderr


def test_a_reason_that_cannot_be_written_leaves_nothing_half_done(tmp_path):
    from roots_dist.runs.train.stop_signal import record_end

    (tmp_path / "ended.txt").mkdir()  # as on a full disk, no file gets this name
    record_end(tmp_path, "finished after step 3")
    assert [path.name for path in tmp_path.iterdir()] == ["ended.txt"] and read_end(tmp_path / "ended.txt") == ""


def test_the_rank_that_fails_leaves_its_reason_and_another_ranks_failure_is_none(tmp_path):
    from roots_dist.runs.train.stop_signal import record_failure

    for rank, error in (
        (0, ConnectionError("Connection closed by peer")),
        (1, ValueError("the flux capacitor\nis empty")),
    ):
        with pytest.raises(type(error)), record_failure(tmp_path, f"rank {rank} (pp0 dp0 tp{rank})", rank0=rank == 0):
            raise error
    ended = read_end(tmp_path / "ended.txt")
    assert ended.startswith("failed: rank 1 (pp0 dp0 tp1), node ") and ended.endswith(": the flux capacitor")
