"""`roots evaluate`: the loss of a checkpoint does not depend on the layout that reads it, and is the one training logged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from roots_dist.config.load import Loaded
from roots_dist.config.schema import Config
from roots_dist.data.store import Writer
from roots_dist.errors import CheckpointError, ConfigError
from roots_dist.evaluate.evaluate import evaluate
from roots_dist.launch.start import ready
from roots_dist.launch.verbs import EVALUATE
from roots_dist.layout import Layout
from roots_dist.mesh import Mesh
from roots_dist.testing.world import on_world
from roots_dist.track.metrics import METRICS_FILE, read_lines
from roots_dist.train.loop import train

ROOT = Path(__file__).parents[2]
VOCAB, SEQ, TOKENS = 61, 8, 700


def corpus(path: Path, seed: int) -> str:
    """Only some of the ids occur, which can be learned in three steps."""
    with Writer(path, np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(seed).integers(0, VOCAB // 4, TOKENS).astype("<u2"))
        writer.commit()
    return str(path)


def trained(rank: int, size: int, config: Config) -> None:
    train(config, Mesh.single())


def evaluated(rank: int, size: int, folder: str, overrides: list[str]) -> tuple[float, int]:
    loaded = EVALUATE.fit(EVALUATE.read(folder, overrides), size)
    layout = ready(loaded, size, None, EVALUATE.needless)
    score = evaluate(loaded.config, Mesh.connect(layout, rank))
    return score.loss, score.targets


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Trained in one process for three steps; its batch of 3 sequences fits no other layout."""
    place = tmp_path_factory.mktemp("evaluate")
    config = Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": VOCAB},
            "data": {"train": corpus(place / "train", 0), "validation": corpus(place / "held_out", 1), "seq": SEQ},
            "train": {"steps": 3, "batch": 3, "device": "cpu", "eval_sequences": 10**6},
            "optim": {"lr": 1e-2},
            "track": {"folder": str(place / "run"), "wandb": "disabled"},
        }
    )
    on_world(1, trained, config)
    (place / "train.bin").unlink()  # evaluation does not need it
    return place / "run"


@pytest.mark.parametrize(
    "size, overrides",
    [
        (4, ["parallel.tp=2", "parallel.pp=2"]),
        (2, ["parallel.tp=2", "parallel.sequence=true", "train.micro_batch=2"]),
        (2, ["parallel.pp=2", "train.micro_batch=5"]),
        (3, []),
    ],
)
def test_the_loss_is_the_one_that_training_logged_in_any_layout(run, size, overrides):
    logged = [line["loss/validation"] for line in read_lines(run / METRICS_FILE) if "loss/validation" in line]
    assert logged[0] > logged[-1] + 1e-3
    for loss, targets in on_world(size, evaluated, str(run), overrides):
        assert targets == (TOKENS - 1) // SEQ * SEQ  # all of the held-out text
        assert loss == pytest.approx(logged[-1], rel=1e-6)


def roots(*arguments: str) -> subprocess.CompletedProcess[str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environ = {k: v for k, v in os.environ.items() if k not in names} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "roots_dist", "evaluate", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def test_the_command_starts_the_processes_that_a_layout_needs(run):
    found = roots(str(run), "parallel.tp=2")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    loss = float(re.search(r"^loss +([\d.]+) nats per token", found.stdout, re.MULTILINE)[1])
    assert loss == pytest.approx(on_world(1, evaluated, str(run), [])[0][0], abs=1e-4)
    assert f"{(TOKENS - 1) // SEQ * SEQ:,} in {(TOKENS - 1) // SEQ} sequences" in found.stdout


def test_what_is_no_run_or_has_nothing_to_be_measured_on_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="not the folder of a run.*Fix: "):
        EVALUATE.read(str(tmp_path), [])
    with pytest.raises(ConfigError) as refused:
        EVALUATE.read(str(run), ["data.validation=[]"])
    assert [p.key for p in refused.value.problems] == ["data.validation"]
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    loaded = EVALUATE.fit(EVALUATE.read(str(tmp_path), []), 1)
    with pytest.raises(CheckpointError, match="no complete checkpoint.*Fix: "):
        evaluate(loaded.config, Mesh.single())


def test_a_rule_of_training_does_not_bind_evaluation_and_others_do(run):
    loaded = EVALUATE.fit(EVALUATE.read(str(run), ["data.tokenizer=gone.json"]), 1)
    assert ready(loaded, 1, 1, EVALUATE.needless) == Layout()
    with pytest.raises(ConfigError) as refused:
        ready(loaded, 1, 1)
    assert [p.key for p in refused.value.problems] == ["data.train", "data.tokenizer"]
    wide = Loaded(loaded.config.changed({"parallel.tp": 3}))
    with pytest.raises(ConfigError, match="parallel.tp = 3"):
        ready(wide, 3, 1, EVALUATE.needless)
