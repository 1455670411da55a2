"""A run that fails three times in the same way is not started again, whoever starts it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import roots

from roots_dist.cli.train import check
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import NotFiniteError, UserError
from roots_dist.learning.data.store import Writer
from roots_dist.runs.train.loop import _end_of_hang, train
from roots_dist.runs.train.repeats import FAILURES_FILE, note_failure, read_failures, refuse_repeats
from roots_dist.storage.checkpoint.run_identity import begin_attempt
from roots_dist.world.mesh import Mesh


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run whose second step finds weights that are not finite."""
    with Writer(tmp_path / "text", np.dtype("<u2")) as writer:
        writer.add(np.arange(400, dtype="<u2") % 61)
        writer.commit()
    return Config.model_validate(
        {
            "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 61},
            "data": {"train": str(tmp_path / "text"), "seq_length": 8},
            "train": {"steps": 5, "global_batch": 2, "device": "cpu"},
            "optim": {"lr": 1e30, "clip_grad": 0},
            "track": {"folder": str(tmp_path / "run"), "wandb": "disabled", "tensorboard": "off"},
        }
    )


def fail(config: Config) -> None:
    with pytest.raises(NotFiniteError, match="step 2: "):
        train(config, Mesh.single())


def refused(config: Config) -> str:
    """What is said instead of starting."""
    try:
        refuse_repeats(config)
    except UserError as error:
        return str(error)
    return ""


def test_a_run_that_failed_three_times_in_the_same_way_is_refused_before_it_starts(config, tmp_path):
    folder = tmp_path / "run"
    for _ in range(3):
        check(config)
        fail(config)
    assert [(one.attempt, one.step) for one in read_failures(folder)] == [(1, 2), (2, 2), (3, 2)]
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    found = roots("train", str(tmp_path / "run.yaml"))
    assert found.returncode == 2 and found.stderr.count("✗") == 1, found.stderr
    assert "beyond step 2, where it has failed 3 times in the same way (NotFiniteError: step 2: " in found.stderr
    assert (
        f"remove {folder / FAILURES_FILE}" in found.stderr
        and json.loads((folder / "run.json").read_text())["attempt"] == 3
    )
    check(config.changed({"optim.lr": 1e-3}))
    (folder / FAILURES_FILE).unlink()
    check(config)


def test_only_the_same_failure_of_the_same_step_counts_and_once_for_each_start(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()

    def start(step: int, cause: str) -> None:
        begin_attempt(folder, "")
        for _ in range(2):  # two ranks say it
            note_failure(folder, config, step, cause)

    for step, cause in (
        (4, "OSError: no"),
        (5, "ValueError: 0.5 on rank 1"),
        (4, "ValueError: 0.25"),
        (4, "ValueError: 2"),
    ):
        start(step, cause)
        assert not refused(config)
    start(4, "ValueError: 1e-3")
    assert "beyond step 4, where it has failed 3 times" in refused(config)
    assert not refused(config.changed({"checkpoint.resume": False}))
    start(0, "ValueError: before the first step")
    assert len(read_failures(folder)) == 5
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert not refused(config)  # it has got beyond
    (folder / FAILURES_FILE).write_text('{"failures": [{"attempt": 1, "step": 2, "cause": 3, "config": "x"}]}')
    assert not refused(config)


def test_a_hang_is_a_failure_whatever_process_it_names(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for process in (11, 12, 13):
        assert not refused(config)
        begin_attempt(folder, "")
        _end_of_hang(folder, config, 7, f"hang in step 7: rank 1 (tp1, node n{process}, process {process})")
    assert "beyond step 7" in refused(config)
