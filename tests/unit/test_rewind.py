"""A spike takes a run back to its newest checkpoint, and the samples since are left out: as if they had never been in
the corpus, in every layout and engine, and whether or not the run is killed meanwhile."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from roots_dist.config.schema import Config
from roots_dist.errors import CheckpointError
from roots_dist.layout import Layout
from roots_dist.learning.data.store import Writer
from roots_dist.runs.track.metrics import METRICS_FILE
from roots_dist.runs.train import loop, save_job
from roots_dist.runs.train import rewind as rewind_module
from roots_dist.runs.train.left_out import REWINDS_FILE, read_left_out, write_left_out
from roots_dist.runs.train.loop import TrainParts, train
from roots_dist.runs.train.spikes import SpikesError
from roots_dist.storage.checkpoint.format import read_json
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh

STEPS, EVERY, SAMPLES = 40, 10, 120
LEFT_OUT = [[20, 12]]
"""The spike of step 26, which two bad samples make, takes the run back to step 20: 6 steps of 2 samples."""


def config_of(place: Path, **changes: object) -> Config:
    base = Config.model_validate(
        {
            "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 11, "init_std": 0.1},
            "data": {"train": str(place / "text"), "seq_length": 8},
            "train": {
                "steps": STEPS, "global_batch": 2, "device": "cpu", "spike_threshold": 6.0, "on_spike": "rewind",
            },
            "optim": {"lr": 3e-2, "lr_schedule": "constant"},
            "checkpoint": {"every": EVERY},
            "track": {"folder": str(place / "run"), "wandb": "disabled", "tensorboard": "off"},
            "advanced": {"engine": "reference"},
        }
    )  # fmt: skip
    return base.changed({key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A corpus that counts, but for the samples of step 26, which count backwards."""
    text = np.arange(8 * SAMPLES + 1, dtype=np.int64) % 11
    with Writer(tmp_path / "text", np.dtype("<u2")) as writer:
        writer.add(text)
        writer.commit()
    return tmp_path


class Seen:
    """What a run has read and learned. `bad` are numbers of samples whose targets are replaced by other words."""

    def __init__(self, bad=(50, 51), stop_after=math.inf):
        self.bad, self.stop_after = set(bad), stop_after
        self.read: list[list[int]] = []
        self.states: list[object] = []

    def parts(self) -> TrainParts:
        return TrainParts(peak_of_devices=lambda *_: None, on_step=(self._step,))

    def _step(self, state, report) -> None:
        self.states.append(state)
        if len(self.read) >= self.stop_after:
            if state.saves.under_way is not None:
                assert state.saves.under_way.wait(60), "a kill would end this thread too"
            raise KeyboardInterrupt

    def watch(self, monkeypatch) -> Seen:
        real = loop.train_step

        def seen(run, batches, *rest):
            self.read.append(sorted(int(i) for batch in batches for i in batch.sample_ids))
            for batch in batches:
                for row, number in enumerate(batch.sample_ids.tolist()):
                    if number in self.bad:
                        batch.targets[row] = (batch.targets[row] + 5) % 11
            return real(run, batches, *rest)

        monkeypatch.setattr(loop, "train_step", seen)
        return self


def weights_of(folder: Path) -> list[bytes]:
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return [path.read_bytes() for path in sorted(newest.glob("*.safetensors"))]


def test_a_spike_takes_a_run_back_and_its_samples_are_never_read_again(place, monkeypatch, caplog):
    config, seen = config_of(place), Seen().watch(monkeypatch)
    assert train(config, Mesh.single(), seen.parts()) == 0
    numbers = [*range(26)] + [step + 6 for step in range(20, STEPS)]
    assert seen.read == [[2 * n, 2 * n + 1] for n in numbers]
    assert read_json(place / "run" / REWINDS_FILE) == {"left_out": LEFT_OUT}
    assert (
        "step 26: loss" in caplog.text
        and "goes on from the checkpoint of step 20, without the 12 samples" in caplog.text
    )
    records = [json.loads(line) for line in (place / "run" / METRICS_FILE).read_text().splitlines()]
    steps = [record["step"] for record in records if "loss/train" in record]
    assert steps == list(range(1, STEPS + 1))
    left_out = [record["train/left_out_samples"] for record in records if "train/left_out_samples" in record]
    assert left_out[-1] == 12
    monkeypatch.undo()  # a run that never had those samples, and judges no step
    never = Seen(bad=()).watch(monkeypatch)
    plain = config_of(place, train__spike_threshold=None, train__on_spike="skip", track__folder=str(place / "never"))
    monkeypatch.setattr(
        loop.TrainState, "batches_at", lambda self, step: self.training.at(step, 12 if step >= 20 else 0)
    )
    train(plain, Mesh.single(), never.parts())
    assert never.read == [[2 * n, 2 * n + 1] for n in (*range(20), *range(26, STEPS + 6))]
    assert weights_of(place / "run") == weights_of(place / "never")


@pytest.mark.parametrize("stop_after", [26, 30, 37], ids=["at once", "before a checkpoint", "after one"])
def test_a_run_that_is_killed_after_it_went_back_reads_what_it_would_have_read(place, monkeypatch, stop_after):
    whole = Seen().watch(monkeypatch)
    train(config_of(place, track__folder=str(place / "whole")), Mesh.single(), whole.parts())
    monkeypatch.undo()
    config, seen = config_of(place), Seen(stop_after=stop_after).watch(monkeypatch)
    if stop_after == 26:
        monkeypatch.setattr(loop, "rewind", _then_die(loop.rewind))
    with pytest.raises(KeyboardInterrupt):
        train(config, Mesh.single(), seen.parts())
    monkeypatch.undo()
    again = Seen().watch(monkeypatch)
    assert train(config, Mesh.single(), again.parts()) == 0
    assert again.read == whole.read[-len(again.read) :] and len(again.read) in (20, 10)
    assert weights_of(place / "run") == weights_of(place / "whole")


def _then_die(rewind):
    def both(*args):
        rewind(*args)
        raise KeyboardInterrupt

    return both


def test_the_third_spike_after_one_checkpoint_stops_the_run_and_a_restart_too(place, monkeypatch):
    config = config_of(place)
    seen = Seen(bad=range(50, 100)).watch(monkeypatch)
    for _ in range(2):
        with pytest.raises(SpikesError, match="step 2[0-9]: loss .* third after the checkpoint of step 20. Fix: "):
            train(config, Mesh.single(), seen.parts())
    assert len(read_json(place / "run" / REWINDS_FILE)["left_out"]) == 2


def test_without_a_checkpoint_the_step_is_skipped_and_a_norm_counts_as_well(place, monkeypatch):
    norms = {"train__spike_threshold": None, "train__norm_spike_threshold": 3.0}
    config, seen = config_of(place, checkpoint__every=30, **norms), Seen(bad=(50, 51, 70, 71)).watch(monkeypatch)
    train(config, Mesh.single(), seen.parts())
    assert read_json(place / "run" / REWINDS_FILE) == {"left_out": [[30, 12]]}
    assert seen.states[-1].skipped == 1


def test_what_the_folder_says_beyond_a_checkpoint_counts_and_another_history_does_not(tmp_path, monkeypatch):
    mesh = Mesh.single()
    assert read_left_out(tmp_path, [[4, 2]], mesh) == ((4, 2),)
    write_left_out(tmp_path, [(4, 2), (9, 3)])
    assert read_left_out(tmp_path, [], mesh) == read_left_out(tmp_path, [[4, 2]], mesh) == ((4, 2), (9, 3))
    assert read_left_out(tmp_path, [[5, 2]], mesh) == ((5, 2),)
    (tmp_path / REWINDS_FILE).write_text('{"left_out": [[4, -2]]}')
    with pytest.raises(CheckpointError, match="rewinds.json: is damaged"):
        read_left_out(tmp_path, [], mesh)


def damaging(steps: dict[int, tuple[int, ...]], folder: Path):
    """A callback that damages checkpoints after a step."""

    def damage(state, report):
        for step in steps.pop(state.step, ()):
            shard = next((folder / "checkpoints" / f"step_{step:08d}").glob("exp_avg-*"))
            shard.write_bytes(bytes(shard.stat().st_size))

    return damage


def test_the_newest_checkpoint_is_damaged_when_a_run_goes_back(place, monkeypatch):
    """It counted as verified still: the next to be deleted was a sound one."""
    config, seen = config_of(place, checkpoint__asynchronous=False), Seen().watch(monkeypatch)
    parts = seen.parts()
    damage = damaging({25: (20,)}, place / "run")
    verified: list[tuple[int, set[int]]] = []
    watch = lambda state, report: verified.append((state.step, set(state.saves.verified)))
    assert train(config, Mesh.single(), replace(parts, on_step=(*parts.on_step, damage, watch))) == 0
    assert read_json(place / "run" / REWINDS_FILE) == {"left_out": [[10, 32]]}
    assert seen.read == [[2 * n, 2 * n + 1] for n in (*range(26), *range(26, STEPS + 16))]
    assert verified[24] == (25, {0, 10, 20}) and verified[25] == (11, {0, 10})
    assert (place / "run" / "checkpoints" / "step_00000020.damaged").is_dir()


def test_going_back_beyond_an_earlier_return_leaves_out_what_both_have_read(place, monkeypatch):
    """Samples were read a second time, and later ones, that had done no harm, passed over."""
    config = config_of(place, train__steps=30, checkpoint__every=8, checkpoint__keep=5, checkpoint__asynchronous=False)
    seen = Seen(bad=(50, 51, 60, 61)).watch(monkeypatch)
    parts = seen.parts()
    damage = damaging({28: (24, 16)}, place / "run")
    assert train(config, Mesh.single(), replace(parts, on_step=(*parts.on_step, damage))) == 0
    numbers = [n for pair in seen.read for n in pair]
    assert numbers == list(range(len(numbers))), "each sample is read once, in order"
    ((step, samples),) = read_json(place / "run" / REWINDS_FILE)["left_out"]
    assert (step, samples) == (8, 46) and len(numbers) == 2 * 30 + 46


def test_the_last_attempt_at_a_save_while_a_run_goes_back_is_of_the_step_before(place, monkeypatch):
    """It was of the spike's step, which was neither skipped nor gone back from."""
    real, opened, settle = save_job.write_checkpoint, threading.Event(), rewind_module.settle

    def save(into, step, *rest):
        if into == place / "run" and step == 20:
            assert opened.wait(60)
            raise CheckpointError("No space left on device")
        return real(into, step, *rest)

    monkeypatch.setattr(save_job, "write_checkpoint", save)
    monkeypatch.setattr(rewind_module, "settle", lambda state: (opened.set(), settle(state)))
    elsewhere = place / "elsewhere"
    config = config_of(place, checkpoint__max_failures=1, checkpoint__fallback_folder=str(elsewhere))
    with pytest.raises(CheckpointError, match="checkpoint.max_failures = 1: .*step_00000025: move it to"):
        train(config, Mesh.single(), Seen().watch(monkeypatch).parts())
    (saved,) = elsewhere.glob("*/checkpoints/step_00000025")
    state = read_json(saved / "state.json")
    assert state["step"] == 25 and state["skipped"] == 0 and state["tokens"] == 25 * 2 * 8


def on_ranks(rank: int, size: int, place: str, layout: dict[str, int], changes: dict[str, object]) -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen().watch(patch)
        config = config_of(Path(place), **changes)
        code = train(config, Mesh.connect(Layout(**layout), rank), seen.parts())
        state = seen.states[-1]
        weights = {
            p.name: state.run.engine.read_state(p.name)["weight"].double().sum().item() for p in state.run.params
        }
        return {"code": code, "left_out": str(state.spikes.left_out), "read": str(seen.read), "sums": str(weights)}


LAYOUTS = {
    "tp2 dp2 zero1": ({"tp": 2, "dp": 2}, {"parallel__tp": 2}),
    "dp2 zero2": ({"dp": 2}, {"advanced__engine": "deepspeed", "parallel__zero_stage": 2}),
    "dp2 zero3": ({"dp": 2}, {"advanced__engine": "deepspeed", "parallel__zero_stage": 3}),
    "pp2": ({"pp": 2}, {"parallel__pp": 2, "model__layers": 2}),
}


@pytest.mark.parametrize(
    "case", ["dp2 zero2", *(pytest.param(case, marks=pytest.mark.full) for case in LAYOUTS if case != "dp2 zero2")]
)
def test_every_layout_and_engine_goes_back_to_the_same_samples(case, place):
    layout, changes = LAYOUTS[case]
    size = math.prod(layout.values())
    found = on_world(size, on_ranks, str(place), layout, changes)
    assert all(rank["code"] == 0 and rank["left_out"] == "((20, 12),)" for rank in found)
    numbers = [*range(26), *range(26, STEPS + 6)]
    for rank in found:
        read = json.loads(rank["read"])
        assert [2 * n for n in numbers] == [ids[0] - ids[0] % 2 for ids in read]
