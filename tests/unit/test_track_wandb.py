"""W&B: a real offline run is read back by W&B's own tool; nothing that fails there reaches training."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from patience import comes_true
from wandb.util import get_core_path

from roots_dist.config.schema import Config
from roots_dist.config.sections import TrackConfig
from roots_dist.errors import EnvironmentProblem
from roots_dist.runs.track import wandb as ours
from roots_dist.runs.track.metrics import METRICS_FILE
from roots_dist.runs.track.trackers import open_trackers

ROOT = Path(__file__).parents[2]


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
    return Config(track=TrackConfig(wandb=mode, tensorboard="off", project="proofs", name="small", tags=("a",)))


def inspect(run) -> dict:
    """Read the offline run written last in the folder: names hold whole seconds, and two runs may share one."""
    file = max(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    found = {}

    def is_whole() -> bool:
        found.update(json.loads(read(file, "--summary")))
        return found["state"] != "unknown"

    assert comes_true(is_whole), "its own process writes the end"
    return found


def read(file: Path, *how: str) -> str:
    """What W&B's reader says, `wandb leet inspect`: the program that this starts after a second of imports."""
    where = ("--run-file", str(file), str(file.parents[1]))
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *how, *where]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout


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
    assert time.monotonic() - start < 60
    assert "there is no W&B key, so the run is written offline" in caplog.text
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
    assert time.monotonic() - start < 60
    assert "does not answer, so the run is written offline" in caplog.text
    assert inspect(tmp_path)["summary"]["loss/train"] == 1


def test_what_fails_in_it_is_said_and_training_goes_on(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    trackers = open_trackers(config("offline"), tmp_path, rank0=True)
    trackers.log(1, {"loss/train": 1.0})
    trackers.close()
    assert "W&B is disabled from here on: division by zero" in caplog.text
    assert json.loads((tmp_path / METRICS_FILE).read_text())["loss/train"] == 1.0


LONELY = """
import sys, time
from pathlib import Path
from roots_dist.config.schema import Config
from roots_dist.config.sections import TrackConfig
from roots_dist.runs.track import wandb
from roots_dist.runs.track.trackers import open_trackers
wandb.INIT_TIMEOUT_S = 6.0
start = time.monotonic()
config = Config(track=TrackConfig(wandb="online", tensorboard="off"))
trackers = open_trackers(config, Path(sys.argv[1]), rank0=True)
for step in range(200):
    trackers.log(step, {"loss/train": 1.0})
print("logged", time.monotonic() - start)
trackers.close()
print("closed", time.monotonic() - start, time.time())
"""


def test_a_server_that_takes_the_call_and_says_nothing_keeps_nobody_waiting(tmp_path, monkeypatch):
    """It listens, but answers no request: the beginning, each step, the end and the process's own end go on
    meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        command = [sys.executable, "-c", LONELY, str(tmp_path / "run")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
        ended = time.time()
    assert done.returncode == 0, done.stderr
    (logged,) = re.findall(r"^logged ([\d.]+)$", done.stdout, re.M)
    ((closed, at),) = re.findall(r"^closed ([\d.]+) ([\d.]+)$", done.stdout, re.M)
    assert float(logged) < 6 and float(closed) < 30 and ended - float(at) < 10  # it is waited for 6 s, by a thread
    assert "does not answer, so the run is written offline" in done.stderr
    assert inspect(tmp_path / "run")["summary"]["_step"] == 199


def test_a_restart_goes_on_with_the_run_and_logs_no_step_twice(tmp_path, capsys):
    def attempt(resumed: int, steps: range, **checkpoint) -> dict:
        asked = config("offline").changed({f"checkpoint.{key}": value for key, value in checkpoint.items()})
        trackers = open_trackers(asked, tmp_path, rank0=True, resumed_step=resumed)
        for step in steps:
            trackers.log(step, {"loss/train": float(step)})
        trackers.close()
        wandb.teardown()
        time.sleep(1 - time.time() % 1)  # W&B names a folder by the second and the id, and the id is kept
        return inspect(tmp_path)

    first = attempt(0, range(1, 8))
    second = attempt(4, range(5, 11))  # the newest checkpoint was that of step 4
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    steps = [[int(record["step"]["num"]) for record in records_of(file, "history")] for file in files]
    assert steps == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]
    assert first["run_id"] == second["run_id"]
    assert attempt(0, range(1, 3), resume=False)["run_id"] != first["run_id"]


def records_of(file, kind: str) -> list[dict]:
    """What was written, record by record."""
    return [record[kind] for record in map(json.loads, read(file).splitlines()) if record["type"] == kind]


def test_a_checkpoint_is_an_artifact_by_reference_and_evaluations_are_a_table(tmp_path):
    weights = tmp_path / "checkpoints" / "step_00000002" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"W" * 5000)
    for artifacts in (True, False):
        asked = config("offline").changed({"track.artifacts": artifacts, "track.group": "sweep"})
        tracker = ours.open_wandb(asked, tmp_path / f"run{artifacts:d}", {})
        tracker.log(2, {"loss/validation": 3.0, "f1/validation": 0.5})
        tracker.checkpoint(2, weights.parent)
        tracker.close()
        assert inspect(tmp_path / f"run{artifacts:d}")["state"] == "finished"
        (file,) = (tmp_path / f"run{artifacts:d}").glob("wandb/offline-run-*/*.wandb")
        models = [record for record in records_of(file, "artifact") if record["type"] == "model"]
        references = [entry["ref"] for record in models for entry in record["manifest"]["contents"]]
        assert references == ([weights.as_uri()] if artifacts else [])
        assert not artifacts or sorted(models[0]["aliases"]) == ["latest", "step-2"]
        assert records_of(file, "run")[0]["run_group"] == "sweep"
        written = [path.read_bytes() for path in (tmp_path / f"run{artifacts:d}").rglob("*") if path.is_file()]
        assert len(written) > 3 and not any(b"W" * 99 in content for content in written)
        (table,) = (tmp_path / f"run{artifacts:d}").rglob("*.table.json")
        assert json.loads(table.read_text())["data"] == [[2, 3.0, 0.5]]
        wandb.teardown()


def test_disabled_and_not_installed(tmp_path, monkeypatch):
    assert ours.open_wandb(config("disabled"), tmp_path, {}) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    assert ours.open_wandb(config("auto"), tmp_path, {}) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ours.open_wandb(config("auto"), tmp_path, {}) is None
    with pytest.raises(
        EnvironmentProblem,
        match=r"wandb: expected this package to be installed. Fix: pip install 'roots_dist\[wandb\]'",
    ):
        ours.open_wandb(config("online"), tmp_path, {})
    assert list(tmp_path.iterdir()) == []
