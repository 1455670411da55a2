"""A run that is told to stop: it ends at a step's border with a checkpoint, on all ranks, says so, and goes on from
there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from commands import environ, roots
from commands import start as start_fork

from roots_dist.cli.main import main
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.learning.data.store import Writer
from roots_dist.runs.ranks.stop_signal import ENDED, read_end, record_own_end
from roots_dist.storage.checkpoint.folder_lock import LOCK_FILE

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
        "track": {"folder": str(place / "run"), "wandb": "disabled", "tensorboard": "off"},
    }
    (place / "run.yaml").write_text(to_yaml(Config.model_validate(config)))
    return place


def start(place: Path, folder: Path, *overrides: str) -> BaseProcess:
    """`roots train`, whose launcher is a fork that has imported what it needs; its ranks begin anew."""
    words = ["train", str(place / "run.yaml"), f"track.folder={folder}", *overrides]
    return start_fork(main, words, environ(), [str(folder.with_name("out")), str(folder.with_name("err"))])


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/train"] for row in rows if "loss/train" in row}


def until_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not (folder / "metrics.jsonl").exists() or max(losses(folder), default=0) < step:
        assert time.monotonic() < deadline, "the run took no steps"
        time.sleep(0.05)


def ranks_of(launcher: BaseProcess) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def finish(run: BaseProcess, folder: Path) -> tuple[int | None, str]:
    try:
        run.join(LIMIT_S)
    finally:
        run.kill()
        run.join()
    return run.exitcode, "".join(folder.with_name(name).read_text() for name in ("out", "err"))


def test_a_lock_that_cannot_be_read_is_anothers(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    record_own_end(tmp_path, "stopped")
    assert not (tmp_path / ENDED).exists()
    (tmp_path / LOCK_FILE).rmdir()
    (tmp_path / LOCK_FILE).write_bytes(b"process \xff")
    with open(tmp_path / LOCK_FILE) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        record_own_end(tmp_path, "stopped")
    assert not (tmp_path / ENDED).exists()
    record_own_end(tmp_path, "stopped")
    assert read_end(tmp_path / ENDED) == "stopped"


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
    run = start(place, folder, "parallel.tp=2")
    until_step(folder, 5)
    assert not (folder / "ended.txt").exists()
    os.kill(run.pid if whom == "the launcher" else ranks_of(run)[-1], number)
    code, said = finish(run, folder)
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
from roots_dist.runs.ranks.stop_signal import catch_stop_signals, record_end
folder = Path({str(tmp_path)!r})
with catch_stop_signals(folder) as stop:
    stop.began = True
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


def test_a_reason_that_cannot_be_written_leaves_nothing_half_done_and_is_said(tmp_path, caplog):
    from roots_dist.runs.ranks.stop_signal import record_end

    (tmp_path / "ended.txt").mkdir()  # as on a full disk, no file gets this name
    record_end(tmp_path, "finished after step 3")
    assert [path.name for path in tmp_path.iterdir()] == ["ended.txt"] and read_end(tmp_path / "ended.txt") == ""
    assert "ended.txt cannot be written; it would say: finished after step 3" in caplog.text


def test_the_rank_that_fails_leaves_its_reason_and_another_ranks_failure_is_none(tmp_path):
    from roots_dist.runs.ranks.stop_signal import record_failure

    for rank, error in (
        (0, ConnectionError("Connection closed by peer")),
        (1, ValueError("the flux capacitor\nis empty")),
    ):
        with pytest.raises(type(error)), record_failure(tmp_path, f"rank {rank} (pp0 dp0 tp{rank})", rank0=rank == 0):
            raise error
    ended = read_end(tmp_path / "ended.txt")
    assert ended.startswith("failed: rank 1 (pp0 dp0 tp1), node ") and ended.endswith(": the flux capacitor")


def _asked(tmp_path, code: str) -> subprocess.CompletedProcess:
    begin = f"""
import logging, os, signal, sys, time
from pathlib import Path
from roots_dist.runs.ranks.stop_signal import catch_stop_signals
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        until = time.monotonic() + 100  # a signal that ends the process does so meanwhile
        while not stop.signal and time.monotonic() < until:
            time.sleep(0.01)
with catch_stop_signals(Path({str(tmp_path)!r})) as stop:
"""
    program = begin + "".join(f"    {line}\n" for line in code.splitlines())
    return subprocess.run([sys.executable, "-c", program], env=environ(), capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize(
    "code, number, said, ended",
    [
        ("send(signal.SIGHUP)", signal.SIGHUP, "", "stopped by SIGHUP before training"),
        ("stop.began = True\nsend(signal.SIGHUP, 15, 15, 15)\nprint(stop.signal)", 0, "1\n", ""),
        ("stop.began = True\nsend(2)\nprint(stop.signal)", 0, "Ctrl-C again ends it at once, without one\n2\n", ""),
        ("stop.began = True\nsend(2, 2)\nprint(stop.signal)", 0, "without one\n2\n", ""),  # as `timeout` sends it
        (
            "stop.began = True\nsend(2)\ntime.sleep(0.6)\nsend(2)",
            2,
            "without one\n",
            "stopped by SIGINT at once, without a checkpoint",
        ),
        ("stop.began = True\nsend(signal.SIGQUIT)", 3, "", "stopped by SIGQUIT at once, without a checkpoint"),
    ],
)
def test_what_each_signal_does_before_and_in_training(code, number, said, ended, tmp_path):
    found = _asked(tmp_path, code)
    assert found.returncode == (128 + number if number else 0), found.stderr
    assert found.stdout.endswith(said) and read_end(tmp_path / "ended.txt") == ended


def test_a_stop_in_an_evaluation_saves_before_the_rest_of_it_and_before_another_step(place, tmp_path):
    from roots_dist.config.load import load
    from roots_dist.runs.train import callbacks
    from roots_dist.runs.train.loop import TrainParts, catch_stop_signals, train_in
    from roots_dist.world.mesh import Mesh

    config = load(place / "run.yaml", [f"track.folder={tmp_path}", f"data.validation={place / 'text'}"])
    config = config.changed({"train.eval_every": 2, "train.eval_sequences": 40})
    seen, real = [], callbacks._until_stopped

    def watched(state):
        def batches(all_of_them):
            for batch in real(state)(all_of_them):
                seen.append(state.step)
                if seen.count(2) == 2:
                    state.stop.signal = signal.SIGTERM
                yield batch

        return batches

    with catch_stop_signals(tmp_path) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "_until_stopped", watched)
        patch.setattr(callbacks, "AT_A_TIME", 3)  # all ranks are asked before the first and the fourth microbatch
        assert train_in(tmp_path, config, Mesh.single(), stop, TrainParts()) == 128 + signal.SIGTERM
    assert seen.count(2) == 3 and max(seen) == 2
    assert read_end(tmp_path / "ended.txt") == "stopped by SIGTERM after step 2"
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()


def test_a_folder_that_is_removed_is_said_at_once_and_not_made_anew(place, tmp_path):
    from roots_dist.config.load import load
    from roots_dist.errors import CheckpointError
    from roots_dist.runs.train.loop import TrainParts, train
    from roots_dist.storage.checkpoint.folder_lock import FolderError
    from roots_dist.world.mesh import Mesh

    folder, elsewhere, steps = tmp_path / "run", tmp_path / "elsewhere", []

    def remove(state, report):
        steps.append(state.step)
        if state.step == 2:
            shutil.rmtree(folder)

    config = load(place / "run.yaml", [f"track.folder={folder}", f"checkpoint.fallback_folder={elsewhere}"])
    with pytest.raises(FolderError, match=r"removed or renamed; the last step is in .*elsewhere.*step_00000003"):
        train(config, Mesh.single(), TrainParts(after_step=(remove,)))
    assert steps == [1, 2, 3] and not folder.exists()
    (three,) = elsewhere.glob("*/checkpoints/step_00000003")
    assert (three / "manifest.json").is_file()
    with pytest.raises(CheckpointError, match=re.escape(f"folder has (none), but {three} is one. Fix: move it to")):
        train(config, Mesh.single())  # a new folder of that name knows no run, and began at step 0 in silence
    other = config.changed({"track.folder": str(tmp_path / "other"), "train.steps": 1})
    assert train(other, Mesh.single()) == 0
    (folder / "checkpoints").mkdir()
    three.rename(folder / "checkpoints" / three.name)
    assert train(config.changed({"train.steps": 4}), Mesh.single()) == 0
    assert read_end(folder / "ended.txt") == "finished after step 4" and min(losses(folder)) == 4


def test_a_full_disk_for_a_while_does_not_end_training(place, tmp_path, monkeypatch, caplog):
    """Nor do lines of metrics that cannot be written: they are written later."""
    from roots_dist.config.load import load
    from roots_dist.errors import CheckpointError
    from roots_dist.runs.train.loop import TrainParts, train
    from roots_dist.world.mesh import Mesh

    real, full = os.write, [False]

    def write(fd, block):
        if full[0] and not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, block)

    def fill(state, report):
        full[0] = state.step in (2, 3, 4)

    monkeypatch.setattr(os, "write", write)
    waits = "checkpoint.asynchronous=false"
    config = load(place / "run.yaml", [f"track.folder={tmp_path}", "checkpoint.every=1", "train.steps=7", waits])
    assert train(config, Mesh.single(), TrainParts(after_step=(fill,))) == 0
    warned = [r.getMessage() for r in caplog.records if "could not be saved" in r.getMessage()]
    assert [f"step {step} could not" in line for step, line in zip((3, 4, 5), warned)] == [True] * 3
    assert "No space left" in warned[0] and "Training goes on; the next attempt is after step 4" in warned[0]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(kept) == ["step_00000006", "step_00000007"]

    other = config.changed({"checkpoint.max_failures": 2, "train.steps": 20})
    with pytest.raises(CheckpointError, match="checkpoint.max_failures = 2: .*No space left.*Fix: see to the disk"):
        train(other, Mesh.single(), TrainParts(after_step=(lambda state, report: full.__setitem__(0, True),)))


def test_a_last_checkpoint_that_is_elsewhere_is_told_and_never_left_behind(place, tmp_path, monkeypatch, caplog):
    """The run said that the same command resumes from it; repeated, it began at step 0."""
    from roots_dist.config.load import load
    from roots_dist.errors import CheckpointError
    from roots_dist.runs.train import save_job
    from roots_dist.runs.train.loop import TrainParts, train
    from roots_dist.world.mesh import Mesh

    folder, elsewhere, real, full = tmp_path / "run", tmp_path / "elsewhere", save_job.write_checkpoint, [True]

    def save(into, *rest, **more):
        if into == folder and full[0]:
            raise CheckpointError("No space left on device")
        return real(into, *rest, **more)

    def stop(state, report):
        state.stop.signal = signal.SIGTERM if state.step == 1 else 0

    monkeypatch.setattr(save_job, "write_checkpoint", save)
    caplog.set_level("INFO")
    own = [f"track.folder={folder}", f"checkpoint.fallback_folder={elsewhere}", "train.steps=4"]
    config, alone = load(place / "run.yaml", own), Mesh.single()
    told = []
    parts = TrainParts(after_step=(stop,), on_checkpoint=(lambda state, path: told.append(path),))
    assert train(config, alone, parts) == 128 + signal.SIGTERM
    own = elsewhere / json.loads((folder / "run.json").read_text())["id"]
    two = own / "checkpoints" / "step_00000002"
    assert told == [two]
    moved = f"its checkpoint is in {two}: move it to {folder / 'checkpoints'}"
    assert read_end(folder / "ended.txt") == f"stopped by SIGTERM after step 2; {moved}"
    assert f"{moved}, and the same command resumes" in caplog.text and "with a checkpoint;" not in caplog.text
    assert json.loads((folder / "run.json").read_text())["saved"] is True
    with pytest.raises(CheckpointError, match=re.escape(f"folder has (none), but {two} is one. Fix: move it to")):
        train(config, alone)
    with pytest.raises(CheckpointError, match="metrics.jsonl up to step 2"):
        train(config.changed({"checkpoint.fallback_folder": None}), alone)

    (folder / "checkpoints").mkdir(exist_ok=True)
    two.rename(folder / "checkpoints" / two.name)
    assert train(config, alone) == 0
    four = own / "checkpoints" / "step_00000004"
    assert read_end(folder / "ended.txt").startswith(f"finished after step 4; its checkpoint is in {four}: move")
    full[0] = False
    with pytest.raises(CheckpointError, match=re.escape(f"(step 2), but {four} is one")):
        train(config, alone)
    shutil.rmtree(four)
    assert train(config, alone) == 0 and read_end(folder / "ended.txt") == "finished after step 4"


def test_the_next_checkpoint_takes_the_place_of_a_best_one_that_could_not_be_saved(place, tmp_path, monkeypatch):
    """An older one stayed marked, and was evaluated and generated from."""
    from roots_dist.config.load import load
    from roots_dist.errors import CheckpointError
    from roots_dist.runs.train import save_job
    from roots_dist.runs.train.loop import TrainParts, train
    from roots_dist.storage.checkpoint.verified import best_or_newest
    from roots_dist.world.mesh import Mesh

    real = save_job.write_checkpoint

    def save(into, step, *rest, **more):
        if step == 2:
            raise CheckpointError("No space left on device")
        return real(into, step, *rest, **more)

    def never_better(state, metrics):
        state.best.value = -1.0 if state.best.step else None

    monkeypatch.setattr(save_job, "write_checkpoint", save)
    own = [f"track.folder={tmp_path}", f"data.validation={place / 'text'}", "finetune.patience=9", "checkpoint.keep=1"]
    own.append("checkpoint.asynchronous=false")
    steps = ["train.eval_every=2", "train.eval_sequences=4"]
    for last in (6, 7):
        config = load(place / "run.yaml", [*own, *steps, f"train.steps={last}"])
        assert train(config, Mesh.single(), TrainParts(on_evaluation=(never_better,))) == 0
        assert best_or_newest(tmp_path).name == "step_00000003"
