"""TensorBoard: the event files are read back by TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import math

import pytest
from tensorboard.backend.event_processing import event_accumulator

from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.config.sections import TrackConfig
from roots_dist.errors import EnvironmentProblem
from roots_dist.runs.track import tensorboard as ours
from roots_dist.runs.track.trackers import open_trackers


def config(**track) -> Config:
    return Config(track=TrackConfig(wandb="disabled", **{"tensorboard": "on", **track}))


def read(folder):
    """Everything, as TensorBoard shows it: what was made void is gone."""
    found = event_accumulator.EventAccumulator(str(folder / ours.FOLDER), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def scalars(folder, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


def text(folder, name: str) -> str:
    return read(folder).Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_numbers_and_texts_are_read_back(tmp_path, capsys):
    facts = {"layout": "TP2", "command": "x --api-key abc123xyz"}
    trackers = open_trackers(config(name="a run"), tmp_path, rank0=True, facts=facts)
    trackers.log(1, {"loss/train": 4.5, "optim/grad_norm": math.nan})
    trackers.log(2, {"loss/train": 4.25})
    trackers.text(2, "sample", "We *the*\n<b>people</b>")
    trackers.checkpoint(2, tmp_path / "checkpoints")
    trackers.close()
    assert scalars(tmp_path, "loss/train") == [(1, 4.5), (2, 4.25)]
    ((step, value),) = scalars(tmp_path, "optim/grad_norm")
    assert step == 1 and math.isnan(value)
    assert text(tmp_path, "sample") == "    We *the*\n    <b>people</b>"  # in Markdown: as it stands
    assert "name: a run" in text(tmp_path, "config") and '"layout": "TP2"' in text(tmp_path, "facts")
    assert "abc123xyz" not in text(tmp_path, "facts")


def test_no_step_is_there_twice_after_a_restart_and_a_run_that_begins_anew_is_alone(tmp_path, capsys):
    def attempt(resumed: int, steps: range, value: float) -> None:
        trackers = open_trackers(config(), tmp_path, rank0=True, resumed_step=resumed)
        for step in steps:
            trackers.log(step, {"loss/train": value})
        trackers.close()

    attempt(0, range(1, 8), 1.0)
    attempt(4, range(5, 10), 2.0)  # the newest checkpoint was that of step 4
    assert scalars(tmp_path, "loss/train") == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 10)]
    attempt(0, range(1, 3), 3.0)
    assert scalars(tmp_path, "loss/train") == [(1, 3.0), (2, 3.0)]


def test_on_off_and_not_installed(tmp_path, monkeypatch, capsys):
    for words, value in (("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on"), ("'off'", "off")):
        (tmp_path / "run.yaml").write_text(f"track: {{tensorboard: {words}}}\n")
        assert load(tmp_path / "run.yaml").track.tensorboard == value
    open_trackers(config(tensorboard="off"), tmp_path / "off", rank0=True).close()
    assert not (tmp_path / "off" / ours.FOLDER).exists()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    open_trackers(config(tensorboard="auto"), tmp_path / "auto", rank0=True).close()
    assert not (tmp_path / "auto" / ours.FOLDER).exists()
    with pytest.raises(EnvironmentProblem) as caught:
        open_trackers(config(), tmp_path / "on", rank0=True)
    assert str(caught.value) == (
        "tensorboard: expected this package to be installed. Fix: pip install 'roots_dist[tensorboard]'."
    )


def test_a_disk_that_is_full_ends_the_view_and_not_the_run(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(
        ours.TensorBoard, "log", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    trackers = open_trackers(config(), tmp_path, rank0=True)
    trackers.log(1, {"loss/train": 1.0})
    trackers.close()
    assert "TensorBoard is disabled from here on: [Errno 28] No space left on device" in caplog.text
