"""W&B: a real offline run is read back by W&B's own tool; nothing that fails there reaches training."""

import json
import subprocess
import sys
import time

import pytest

from roots_dist.config.schema import Config, Track
from roots_dist.errors import EnvironmentProblem
from roots_dist.track import wandb as ours

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No key, no netrc, no settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def config(mode: str) -> Config:
    return Config(track=Track(wandb=mode, project="proofs", name="small", tags=("a",)))


def inspect(run) -> dict:
    """Of the newest offline run in the folder, by W&B's reader."""
    (file,) = sorted(run.glob("wandb/offline-run-*/*.wandb"))[-1:]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


def test_an_offline_run_is_there_and_holds_no_secret(tmp_path):
    facts = {"layout": "TP2", "command": ["train", "--api-key", "abc123xyz"], "origin": "https://me:hunter2@git/x"}
    tracker = ours.open_wandb(config("auto"), tmp_path / "run", facts)
    tracker.log(1, {"loss/train": 4.5})
    tracker.log(2, {"loss/train": 4.25})
    tracker.text(2, "sample", "a < b")
    tracker.close()
    found = inspect(tmp_path / "run")
    assert found["state"] == "finished" and found["project"] == "proofs" and found["name"] == "small"
    assert found["summary"]["loss/train"] == 4.25 and found["summary"]["_step"] == 2
    assert found["config"]["facts"]["layout"] == "TP2" and found["config"]["model"]["layers"] == 4
    for path in (tmp_path / "run" / "wandb").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"hunter2" not in content and b"abc123xyz" not in content and b"pytest/__main__" not in content, path
    identity = (tmp_path / "run" / ours.ID_FILE).read_text().strip()
    assert found["run_id"] == identity

    again = ours.open_wandb(config("offline"), tmp_path / "run", {})
    again.close()
    assert inspect(tmp_path / "run")["run_id"] == identity


def test_online_without_a_key_neither_asks_nor_waits(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    start = time.monotonic()
    tracker = ours.open_wandb(config("online"), tmp_path, {})
    tracker.close()
    assert time.monotonic() - start < 10
    assert "there is no W&B key: the run is written offline" in caplog.text
    assert inspect(tmp_path)["state"] == "finished"


def test_a_server_that_does_not_answer_costs_the_timeout_and_no_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(ours, "INIT_TIMEOUT_S", 1.0)
    wandb.teardown()
    start = time.monotonic()
    tracker = ours.open_wandb(config("auto"), tmp_path, {})
    tracker.log(1, {"loss/train": 1.0})
    tracker.close()
    assert time.monotonic() - start < 15
    assert "does not answer, the run is written offline" in caplog.text
    assert inspect(tmp_path)["summary"]["loss/train"] == 1


class Broken:
    calls = 0

    def log(self, *_, **__):
        self.calls += 1
        raise ConnectionError("gone")

    def finish(self):
        raise AssertionError("called after it was switched off")


def test_a_failure_is_said_once_and_ends_tracking(caplog):
    run = Broken()
    tracker = ours.Wandb(wandb, run)
    for step in range(5):
        tracker.log(step, {})
        tracker.text(step, "sample", "x")
    tracker.close()
    assert run.calls == 1
    assert [r.getMessage() for r in caplog.records] == ["W&B is off from here on: gone"]


def test_a_failure_to_begin_is_said_and_training_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    assert ours.open_wandb(config("offline"), tmp_path, {}) is None
    assert "W&B is off for this run: division by zero" in caplog.text


def test_disabled_and_not_installed(tmp_path, monkeypatch):
    assert ours.open_wandb(config("disabled"), tmp_path, {}) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    assert ours.open_wandb(config("auto"), tmp_path, {}) is None
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    assert ours.open_wandb(config("auto"), tmp_path, {}) is None
    with pytest.raises(EnvironmentProblem, match=r"needs the package wandb: pip install 'roots_dist\[wandb\]'"):
        ours.open_wandb(config("online"), tmp_path, {})
    assert list(tmp_path.iterdir()) == []
