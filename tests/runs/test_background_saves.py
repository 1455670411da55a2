"""Checkpoints that are written while training goes on: those of a run that waits, to the bit, under the same rules."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from roots_dist.accounting.memory import state_bytes
from roots_dist.checks import readiness
from roots_dist.checks.facts import Facts
from roots_dist.config.schema import Config
from roots_dist.errors import CheckpointError, Problem
from roots_dist.layout import Layout
from roots_dist.learning.data.store import Writer
from roots_dist.runs.plan.plan_table import lines
from roots_dist.runs.plan.predict import predict
from roots_dist.runs.ranks.flight_recorder import read_dump
from roots_dist.runs.ranks.stop_signal import read_end
from roots_dist.runs.track.trackers import Trackers
from roots_dist.runs.train import callbacks, save_job, saving
from roots_dist.runs.train.loop import TrainParts, train
from roots_dist.storage.checkpoint import disk
from roots_dist.storage.checkpoint.host_copies import HostCopies
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.world import progress
from roots_dist.world.mesh import Mesh

LIMIT_S = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("background") / "text"
    with Writer(path, np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(0).integers(0, 61, 2000).astype("<u2"))
        writer.commit()
    return str(path)


def config_of(text: str, folder: Path, **changes: object) -> Config:
    tree = {
        "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 61, "dropout": 0.1},
        "data": {"train": text, "seq_length": 8},
        "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "device": "cpu"},
        "optim": {"lr": 1e-2, "lr_schedule": "constant"},
        "checkpoint": {"every": 2, "keep": 9},
        "track": {"folder": str(folder), "wandb": "disabled", "tensorboard": "off"},
    }
    return Config.from_tree(tree).changed(changes)


class Gate:
    """Holds saves back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.began, self.opened, self.real = [], threading.Event(), save_job.write_checkpoint
        patch.setattr(save_job, "write_checkpoint", self)

    def __call__(self, folder, step, *rest, **more):
        self.began.append(step)
        if threading.current_thread() is not threading.main_thread():
            assert self.opened.wait(LIMIT_S)
        return self.real(folder, step, *rest, **more)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def opens_late(gate, monkeypatch) -> None:
    """The gate is opened a while after training has begun to wait for the save."""
    real = saving.settle

    def settle(state):
        if state.saves.under_way is not None:
            threading.Timer(0.3, gate.opened.set).start()
        real(state)

    monkeypatch.setattr(saving, "settle", settle)


def shards(folder: Path, step: int) -> dict[str, str]:
    files = json.loads((folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}


def held_back_on(rank: int, size: int, config: Config, layout: Layout) -> list[int]:
    """Train, with every save held back until two more steps are done. Returns after which steps one was under way."""
    during = []
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)

        def watch(state, report):
            if state.saves.under_way is not None:
                during.append(state.step)
                if state.step >= state.saves.under_way.job.step + 1:
                    gate.opened.set()
                    assert state.saves.under_way.wait(LIMIT_S)
                    gate.opened.clear()

        assert train(config, Mesh.connect(layout, rank), TrainParts(after_step=(watch,))) == 0
    return during


LAYOUTS = [
    (Layout(), {}),
    (Layout(tp=2), {"parallel.tp": 2}),
    (Layout(dp=2), {"parallel.zero_stage": 1, "advanced.engine": "reference"}),
    *(
        pytest.param(layout, changes, marks=pytest.mark.full)
        for layout, changes in [
            (Layout(pp=2), {"parallel.pp": 2}),
            *((Layout(dp=2), {"parallel.zero_stage": stage, "advanced.engine": "deepspeed"}) for stage in (1, 2, 3)),
        ]
    ),
]


@pytest.mark.parametrize("layout, changes", LAYOUTS)
def test_a_copy_is_of_its_step_while_training_goes_on(layout, changes, text, tmp_path):
    """What is written later has the bytes of a run that waits, and the next checkpoints too: nothing else changed."""
    world = on_world if changes.get("advanced.engine") == "deepspeed" else on_warm_world
    if layout.world_size == 1:
        world = lambda size, work, *args, **more: [work(0, size, *args)]
    own = {"advanced.engine": "reference", **changes}
    while_training = config_of(text, tmp_path / "background", **own)
    during = world(layout.world_size, held_back_on, while_training, layout, timeout=250)
    assert all(steps == [2, 3, 4, 5] for steps in during), during
    waits = config_of(text, tmp_path / "waits", **own).changed({"checkpoint.asynchronous": False})
    assert not any(world(layout.world_size, held_back_on, waits, layout, timeout=250))
    for step in (2, 4, 6):
        assert shards(tmp_path / "background", step) == shards(tmp_path / "waits", step)


def test_each_save_copies_once_and_into_the_memory_of_the_one_before(text, tmp_path, monkeypatch):
    """New memory costs three times as much as the copy: the kernel clears each page."""
    jobs, copied, real = [], [], HostCopies.__call__

    def copies(self, kind, name, tensor):
        copied.append((kind, name))
        return real(self, kind, name, tensor)

    def watch(state, report):
        if state.saves.under_way is not None and state.saves.under_way.job not in jobs:
            jobs.append(state.saves.under_way.job)
            assert state.saves.under_way.wait(LIMIT_S)

    monkeypatch.setattr(HostCopies, "__call__", copies)
    assert train(config_of(text, tmp_path, **{"train.steps": 7}), Mesh.single(), TrainParts(after_step=(watch,))) == 0
    first, second, third = ([t for shard in job.shards for t in shard.tensors.values()] for job in jobs)
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second] == [t.data_ptr() for t in third]
    assert len(copied) == 3 * len(set(copied)) == 3 * len(first)
    assert len({t.data_ptr() for t in first}) == len(first), "no two tensors share memory"


def test_a_second_save_waits_for_the_first_and_says_so(text, tmp_path, gate, opens_late, caplog):
    assert train(config_of(text, tmp_path), Mesh.single()) == 0
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("the checkpoint of step 4 waits for that of step 2" in line for line in said), said
    assert gate.began == [2, 4, 6]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert next(row["step"] for row in rows if row.get("time/save_s", 0) > 0.25) == 4
    assert any(row["step"] == 4 and row.get("time/checkpoint_s", 0) > 0.2 for row in rows)


def test_a_save_that_fails_in_the_background_is_said_at_the_next_step_and_tried_again(
    text, tmp_path, monkeypatch, caplog
):
    real, full, settled = os.write, threading.Event(), []

    def write(fd, block):
        in_background = threading.current_thread() is not threading.main_thread()
        if in_background and full.is_set() and not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, block)

    def watch(state, report):
        if state.saves.under_way is not None:
            state.saves.under_way.wait(LIMIT_S)
        (full.set if state.step < 4 else full.clear)()
        settled.append((state.step, state.saves.failures))

    monkeypatch.setattr(os, "write", write)
    full.set()
    config = config_of(text, tmp_path, **{"checkpoint.every": 3, "train.steps": 9})
    assert train(config, Mesh.single(), TrainParts(after_step=(watch,))) == 0
    (said,) = [r.getMessage() for r in caplog.records if "could not be saved" in r.getMessage()]
    assert "the checkpoint of step 3 could not be saved (1 in a row)" in said and "No space left" in said
    assert "Training goes on; the next attempt is after step 5" in said
    assert settled[2:5] == [(3, 0), (4, 1), (5, 1)] and settled[5] == (6, 0)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"step_0000000{step}" for step in (5, 6, 9)]

    full.set()
    other = config.changed({"checkpoint.max_failures": 1, "train.steps": 20})
    with pytest.raises(CheckpointError, match="checkpoint.max_failures = 1: .*No space left.*Fix: see to the disk"):
        train(other, Mesh.single(), TrainParts(after_step=(lambda state, report: full.set(),)))


@pytest.mark.parametrize("dies", [MemoryError("no more"), None])
def test_a_writer_that_dies_is_noticed_at_the_next_step(dies, text, tmp_path, monkeypatch):
    def work(self):
        self._error = dies

    steps = []
    monkeypatch.setattr(save_job.BackgroundSave, "_work", work)
    with pytest.raises((MemoryError, RuntimeError), match="no more|the thread that saves step 2 has ended without"):
        train(config_of(text, tmp_path), Mesh.single(), TrainParts(after_step=(lambda s, r: steps.append(s.step),)))
    assert steps == [1, 2]


def dies_on_rank_1(rank: int, size: int, config: Config) -> tuple[str, list[int]]:
    """Train with a thread that dies on rank 1, and has nothing to say to those of other ranks."""
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(save_job, "write_checkpoint", mock.Mock(side_effect=MemoryError("no more")))

        def watch(state, report):
            steps.append(state.step)
            if rank == 1 and state.saves.under_way is not None:
                assert state.saves.under_way.wait(LIMIT_S)

        try:
            train(config, Mesh.connect(Layout(tp=size), rank), TrainParts(after_step=(watch,)))
        except Exception as error:
            return f"{type(error).__name__}: {error}", steps
    return "", steps


def test_a_writer_that_dies_on_one_rank_ends_all_of_them_at_the_next_step(text, tmp_path):
    """The others' threads wait for it, and nobody looked before the next save, hundreds of steps later."""
    config = config_of(text, tmp_path, **{"parallel.tp": 2, "checkpoint.every": 4, "train.steps": 12})
    (first, steps), (second, others) = on_warm_world(2, dies_on_rank_1, config)
    assert first.startswith("RuntimeError: the thread that saves step 4 has died on rank 1 (") and "no more" in first
    assert second == "MemoryError: no more" and steps == others == [1, 2, 3, 4]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_save_that_never_ends_ends_the_run_by_name(at_the_end, text, tmp_path, monkeypatch, caplog):
    """A disk or a store that blocks: alone nobody noticed, and with others it took twice the time."""
    NEVER.clear()
    monkeypatch.setattr(saving, "_limit_s", lambda state: 0.4)
    monkeypatch.setattr(saving, "GRACE_S", 0.2)
    monkeypatch.setattr(save_job, "write_checkpoint", lambda *_: _blocks())
    config = config_of(text, tmp_path, **{"train.steps": 4 if at_the_end else 10_000, "checkpoint.every": 2})
    if not at_the_end:
        config = config.changed({"checkpoint.every": 9_999, "train.eval_every": 0})
        monkeypatch.setattr(callbacks, "is_due", lambda state, every: every == 9_999 and state.step == 2)
    began = time.monotonic()
    said = "save_timeout_s = 0.4: expected the save of step 2 to move .* at .*, _blocks. Fix: see to the disk"
    with pytest.raises(CheckpointError, match=said):
        train(config, Mesh.single())
    assert time.monotonic() - began < 20
    assert re.match("failed: .*the save of step 2 to move", read_end(tmp_path / "ended.txt"))
    assert at_the_end or "the checkpoint of step 2 is being written for" in caplog.text
    NEVER.set()


NEVER = threading.Event()


def _blocks() -> None:
    while not NEVER.is_set():
        time.sleep(0.02)


def test_a_save_that_moves_is_no_hang_however_long_it_takes(text, tmp_path, monkeypatch):
    """By a clock that writing alone moves."""
    real, now = disk.os.write, [0.0]

    def slow(fd, block):
        if threading.current_thread() is not threading.main_thread() and len(block) > 500:
            now[0] += 0.1
        return real(fd, block)

    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(saving, "_limit_s", lambda state: 0.5)
    monkeypatch.setattr(saving, "GRACE_S", 0.0)
    for module in (save_job, progress):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(disk.os, "write", slow)
    assert train(config_of(text, tmp_path, **{"train.steps": 3}), Mesh.single()) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("time/save_s", 0) for row in rows) > 0.8


@pytest.mark.parametrize("ends", ["a signal", ValueError("no more"), KeyboardInterrupt("no more")], ids=repr)
def test_whoever_stops_waits_for_the_save_that_is_under_way(ends, text, tmp_path, gate, caplog):
    said = f"{type(ends).__name__}: no more; the checkpoint of step 2 is written to its end before the run stops"

    def watch(state, report):
        if state.step == 3 and ends != "a signal":
            raise ends
        if state.step == 3:
            threading.Timer(0.3, gate.opened.set).start()
            state.stop.signal = signal.SIGTERM

    def open_when_said(record):
        """The cause is said before the wait, which else would not end."""
        gate.opened.set() if record.getMessage() == said else None
        return True

    caplog.set_level("INFO")
    config = config_of(text, tmp_path)
    if ends != "a signal":
        with caplog.filtering(open_when_said), pytest.raises(type(ends), match="no more"):
            train(config, Mesh.single(), TrainParts(after_step=(watch,)))
        assert said in caplog.messages
    else:
        config = config.changed({"checkpoint.every": 2})
        assert train(config, Mesh.single(), TrainParts(after_step=(watch,))) == 128 + signal.SIGTERM
        assert read_end(tmp_path / "ended.txt") == "stopped by SIGTERM after step 4"
        assert shards(tmp_path, 4)
    assert shards(tmp_path, 2)


def test_a_save_that_takes_too_long_is_waited_for(text, tmp_path, opens_late, monkeypatch, caplog):
    """So that the watchdog sees it and names the rank, if it never ends."""
    monkeypatch.setattr(saving, "_limit_s", lambda state: 0.2)
    monkeypatch.setattr(saving, "GRACE_S", 30)
    config = config_of(text, tmp_path, **{"checkpoint.every": 1, "train.steps": 3})

    def watch(state, report):
        if state.step == 1:
            time.sleep(0.3)

    assert train(config, Mesh.single(), TrainParts(after_step=(watch,))) == 0
    assert "the checkpoint of step 1 is being written for " in caplog.text


def test_a_process_that_was_stopped_during_a_save_has_not_hung(monkeypatch):
    """Ctrl-Z, or a job that Slurm suspends: the save had not moved for as long as it was stopped, and ended the run."""
    now, ended = [1000.0], []

    class UnderWay:
        """A save whose process stands still for an hour from the second look on, and then goes on."""

        looks, seconds, job, at = 0, 1.0, SimpleNamespace(step=4), "here"

        def wait(self, seconds):
            self.looks += 1
            now[0] += 3600 if self.looks == 2 else seconds
            self.moved = now[0] if self.looks in (0, 4) else getattr(self, "moved", now[0])
            return self.looks > 8

        @property
        def still_s(self):
            return now[0] - self.moved

        def result(self):
            return Path("step_4")

    def state_of(under_way):
        saves = SimpleNamespace(under_way=under_way, succeeded=lambda step: ended.append(step))
        mesh = Mesh.single()
        return SimpleNamespace(saves=saves, mesh=mesh, trackers=Trackers(), step=5, on_checkpoint=())

    monkeypatch.setattr(saving, "_limit_s", lambda state: 60.0)
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now[0]))
    saving.settle(state_of(UnderWay()))
    assert ended == [4]

    class Never(UnderWay):
        def wait(self, seconds):
            now[0] += 0.1
            self.moved = getattr(self, "moved", now[0])
            return now[0] > 1e9

    began = now[0]
    monkeypatch.setattr(saving, "_end_hanging", lambda *_: (_ for _ in ()).throw(CheckpointError("hangs")))
    with pytest.raises(CheckpointError, match="hangs"):
        saving.settle(state_of(Never()))
    assert 60 < now[0] - began < 60 + saving.GRACE_S + 1


def test_the_background_is_no_hang_unless_the_main_thread_waits_for_it():
    entry = {"process_group": ["3", "background"], "collective_seq_id": 4, "state": "scheduled", "record_id": 1}
    later = entry | {"process_group": ["0", "default_pg"], "collective_seq_id": 9, "record_id": 2}
    dump = {"entries": [each | {"profiling_name": "gloo:all_reduce"} for each in (entry, later)]}
    assert read_dump(dump).pending.title == "world" and read_dump({"entries": dump["entries"][:1]}).pending is None
    waited_for = read_dump(dump, background=True).pending
    assert (waited_for.title, waited_for.number) == ("background", 4)


def test_the_memory_of_the_copy_is_planned(text, tmp_path):
    made = config_of(text, tmp_path)
    plan, of_two = predict(made, Layout()), predict(made, Layout(dp=2))
    copy = 12 * plan.ranks[0].parameters  # float32 weights and both moments
    assert (plan.ranks[0].save_copy, of_two.ranks[0].save_copy) == (copy, copy // 2)
    assert any(line.startswith("from the first checkpoint on: ") for line in lines(plan, None))
    waits, at_the_end = made.changed({"checkpoint.asynchronous": False}), made.changed({"checkpoint.every": 0})
    assert not waits.saves_in_background() and not at_the_end.saves_in_background()
    assert predict(waits, Layout()).ranks[0].save_copy == 0

    def problems(config: Config, memory: int) -> list[Problem]:
        return list(readiness._memory(config, Layout(), Facts(memory=memory)))

    held = state_bytes(made, Layout())
    (problem,) = problems(made, held + copy - 1)
    assert problem.key == "checkpoint.asynchronous" and "Fix: set checkpoint.asynchronous=false" in str(problem)
    assert problems(made, held + copy) == problems(waits, held) == []
