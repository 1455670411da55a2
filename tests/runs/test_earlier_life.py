"""A run whose checkpoints cannot be read does not begin again at step 0 in silence, and a damaged one is not the end:
the one before is taken, by every command that reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import roots

from roots_dist.assembly.run import build_run
from roots_dist.config.load import load, to_yaml
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.errors import CheckpointError, ConfigError
from roots_dist.learning.data.store import Writer
from roots_dist.runs.evaluate.evaluate import evaluate
from roots_dist.runs.train import loop
from roots_dist.runs.train.init_weights import load_init_weights
from roots_dist.runs.train.resume import resume
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.world.mesh import Mesh


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of four steps, with a checkpoint of each of the last two."""
    place = tmp_path_factory.mktemp("life")
    with Writer(place / "text", np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(0).integers(0, 61, 400).astype("<u2"))
        writer.commit()
    config = {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 61},
        "data": {"train": str(place / "text"), "validation": str(place / "text"), "seq_length": 16},
        "train": {"steps": 4, "global_batch": 2, "micro_batch": 2, "device": "cpu", "log_every": 1},
        "optim": {"lr": 1e-3, "lr_schedule": "constant", "warmup_steps": 0},
        "checkpoint": {"every": 1},
        "track": {"folder": str(place / "run"), "wandb": "disabled", "tensorboard": "off"},
    }
    (place / "run.yaml").write_text(to_yaml(Config.model_validate(config)))
    done = roots("train", str(place / "run.yaml"))
    assert done.returncode == 0, done.stderr
    return place


def train(place: Path, run: Path, *words: str):
    return roots("train", str(place / "run.yaml"), f"track.folder={run}", "train.steps=5", *words)


def _each_manifest(change):
    return lambda run: [change(path) for path in run.glob("checkpoints/step_*/manifest.json")]


WAYS = {
    "manifests missing": (_each_manifest(Path.unlink), "manifest.json: is missing"),
    "manifests truncated": (_each_manifest(lambda path: os.truncate(path, 50)), "manifest.json: cannot be read"),
    "manifests empty": (_each_manifest(lambda path: os.truncate(path, 0)), "manifest.json: cannot be read"),
    "folders renamed": (
        lambda run: [path.rename(path.with_name(f"old_{path.name}")) for path in run.glob("checkpoints/step_*")],
        "checkpoints with old_step_00000003, old_step_00000004",
    ),
    "checkpoints a file": (
        lambda run: [shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")],
        "checkpoints, which is no folder",
    ),
    "checkpoints a dangling link": (
        lambda run: [shutil.rmtree(run / "checkpoints"), (run / "checkpoints").symlink_to("nowhere")],
        "checkpoints, which is no folder",
    ),
    "checkpoints not there": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        "metrics.jsonl up to step 4, ended.txt (finished after step 4) and summary.json. Fix",
    ),
    "nothing but metrics": (
        lambda run: [
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in run.iterdir()
            if path.name != "metrics.jsonl"
        ],
        "holds metrics.jsonl up to step 4. Fix",
    ),
}


def content(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "rank_00000.txt"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_without_a_readable_checkpoint_stops_and_touches_nothing(way, place, tmp_path):
    folder = shutil.copytree(place / "run", tmp_path / "run")
    harm, words = WAYS[way]
    harm(folder)
    before = content(folder)
    run = build_run(load(place / "run.yaml"), Mesh.single())
    for _ in range(2):
        with pytest.raises(CheckpointError) as error:
            resume(run, folder)
        said = str(error.value)
        assert f"track.folder = '{folder}'" in said and words in said and "checkpoint.resume=false" in said, said
        assert content(folder) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(place, tmp_path):
    run = tmp_path / "run"
    assert train(place, run, "checkpoint.every=100", "train.steps=3").returncode == 0
    for path in (run / "checkpoints", run / "ended.txt", run / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = json.loads((run / "run.json").read_text())
    assert kept["saved"] is True
    found = train(place, run)
    assert found.returncode == 2 and "metrics.jsonl up to step 3" in found.stderr
    (run / "run.json").write_text(json.dumps(kept | {"saved": False}))  # as it is until the first commit
    found = train(place, run)
    assert found.returncode == 0, found.stderr
    assert "it had ended after step 3, before its first checkpoint" in found.stdout + found.stderr


def test_the_command_stops_too_again_and_again(place, tmp_path):
    """The record of how the run had ended was removed at each start."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    for path in run.iterdir():
        if path.name != "ended.txt":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _ in range(2):
        found = train(place, run)
        assert found.returncode == 2 and found.stderr.count("✗") == found.stderr.count("\n") == 1, found.stderr
        assert "holds ended.before.txt (finished after step 4). Fix" in found.stderr


def test_beginning_anew_renames_what_was_there(place, tmp_path):
    run = shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_bytes()
    found = train(place, run, "checkpoint.resume=false")
    assert found.returncode == 0, found.stderr
    assert (run / "metrics.jsonl.1").read_bytes() == metrics and (run / "summary.json.1").is_file()
    assert json.loads((run / "run.json").read_text())["id"] != json.loads((run / "run.json.1").read_text())["id"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def _evaluate(run: Path, capsys) -> str:
    evaluate(config_of_run(run).config, Mesh.single())
    return capsys.readouterr().out


def _export(run: Path, capsys) -> str:
    return export_model(run, run.parent / "exported")


def _train(run: Path, capsys) -> str:
    config = load(run / "config.yaml", [f"track.folder={run}", "train.steps=5"])
    assert loop.train(config, Mesh.single()) == 0
    return "step_00000003"


def _start_from(run: Path, capsys) -> str:
    config = load(run / "config.yaml", [f"finetune.init_from={run}"])
    load_init_weights(build_run(config, Mesh.single()))
    return "step_00000003"


@pytest.mark.parametrize("command", [_train, _evaluate, _export, _start_from])
def test_every_command_that_reads_takes_the_one_before_a_damaged_one(command, place, tmp_path, caplog, capsys):
    run = shutil.copytree(place / "run", tmp_path / "run")
    flip(next((run / "checkpoints" / "step_00000004").glob("model-*")))
    with caplog.at_level("INFO"):
        said = command(run, capsys)
    assert "step_00000003" in said + caplog.text.replace("after step 3", "step_00000003")
    assert "step_00000004 cannot be trusted" in caplog.text and "sha256 differs" in caplog.text
    aside = run / "checkpoints" / "step_00000004.damaged"
    assert aside.is_dir() and "sha256 differs" in aside.with_name(f"{aside.name}.txt").read_text()


def test_a_checkpoint_of_another_run_is_not_taken(place, tmp_path):
    run, other = shutil.copytree(place / "run", tmp_path / "run"), tmp_path / "other"
    assert loop.train(load(place / "run.yaml", [f"track.folder={other}", "train.steps=5"]), Mesh.single()) == 0
    shutil.copytree(other / "checkpoints" / "step_00000005", run / "checkpoints" / "step_00000005")
    point = resume(build_run(load(place / "run.yaml"), Mesh.single()), run)
    assert point.step == 4 and point.author.attempt == 2
    name = json.loads((other / "run.json").read_text())["id"]
    assert f"run = {name} in its manifest" in (run / "checkpoints" / "step_00000005.damaged.txt").read_text()


def test_a_config_beside_a_checkpoint_that_says_another_model_is_refused(place, tmp_path):
    """Heads of half the number have weights of equal shapes, and the commands computed another function."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("heads: 2", "heads: 1"))
    for command in (_evaluate, _export, _start_from):
        with pytest.raises(ConfigError, match=r"model.heads = 1: .* Fix: set it back, put back the config.yaml"):
            command(run, None)
