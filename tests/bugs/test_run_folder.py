"""The folder of a run: one run at a time, and whatever a kill leaves in it, the next run finds the newest
checkpoint."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import newest, sound

from roots_dist.assembly.run import build_run
from roots_dist.cli.main import main
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, EnvironmentProblem
from roots_dist.learning.data.store import Writer
from roots_dist.runs.ranks import local
from roots_dist.runs.train.best_evaluation import BestEvaluation
from roots_dist.runs.train.left_out import read_left_out, write_left_out
from roots_dist.runs.train.resume import ResumePoint, differences, resume
from roots_dist.runs.train.run_folder import FolderError, hold_folder
from roots_dist.storage.checkpoint.format import STATE_FILE, step_name
from roots_dist.storage.checkpoint.keep import BEST_FILE
from roots_dist.storage.checkpoint.same_model import refuse_another_model, refuse_to_resume
from roots_dist.storage.checkpoint.save import save
from roots_dist.storage.checkpoint.verified import best_or_newest, prune
from roots_dist.world.mesh import Mesh

CONFIG = Config.model_validate(
    {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 29},
        "data": {"seq_length": 8},
        "train": {"global_batch": 1},
    }
)
NONE_LEFT_OUT = {"left_out": ()}


def test_a_checkpoint_that_a_killed_save_had_set_aside_is_resumed(tmp_path):
    """Killed between the two renames that replace a step: its name was read as a number, and the run could not
    start."""
    run = build_run(CONFIG, Mesh.single())
    folder = save(tmp_path, 7, run.engine, run.params, run.mesh, {"skipped": 2})
    os.rename(folder, folder.with_name(".step_00000007.replaced"))
    assert resume(run, tmp_path) == ResumePoint(7, 2, spikes=NONE_LEFT_OUT)
    assert folder.is_dir()


def test_checkpoints_are_set_aside_where_none_is_wanted(tmp_path):
    """A new run of fewer steps was evaluated, and gone on with, by the last checkpoint of the old one."""
    run = build_run(CONFIG.changed({"checkpoint.resume": False}), Mesh.single())
    for _ in range(2):
        folder = save(tmp_path, 7, run.engine, run.params, run.mesh, {})
        (tmp_path / BEST_FILE).write_text('{"step": 7}')
        assert resume(run, tmp_path) == ResumePoint(0, 0)
        assert newest(tmp_path) is None and not (tmp_path / BEST_FILE).exists()
    assert all((tmp_path / f"checkpoints.{number}" / folder.name).is_dir() for number in (1, 2))
    assert resume(run, tmp_path) == ResumePoint(0, 0) and not (tmp_path / "checkpoints.3").exists()


def test_what_an_earlier_life_has_left_is_out_of_the_way_where_none_is_wanted(tmp_path):
    """Without checkpoints and metrics nothing was renamed, and the same key was advised again and again."""
    run = build_run(CONFIG.changed({"checkpoint.resume": False}), Mesh.single())
    (tmp_path / "ended.txt").write_text("finished after step 250\n")
    (tmp_path / "summary.json").write_text("{}")
    assert resume(run, tmp_path) == ResumePoint(0, 0)
    assert (tmp_path / "ended.txt.1").exists() and (tmp_path / "summary.json.1").exists()


def test_a_run_that_begins_at_step_0_has_left_nothing_out(tmp_path):
    """A file of an earlier life was taken over by the first resume: samples were skipped without a word."""
    (tmp_path / "checkpoints").mkdir()
    write_left_out(tmp_path, [(20, 48)])
    resume(build_run(CONFIG, Mesh.single()), tmp_path)
    assert read_left_out(tmp_path, (), Mesh.single()) == ()


def test_a_damaged_mark_of_the_best_stops_nobody(tmp_path, caplog):
    run = build_run(CONFIG, Mesh.single())
    for step in (2, 3, 4):
        save(tmp_path, step, run.engine, run.params, run.mesh, {})
    (tmp_path / BEST_FILE).write_text('{"step"')
    assert best_or_newest(tmp_path).name == "step_00000004"
    assert "which checkpoint is the best is not known" in caplog.text and "Fix" not in caplog.text
    prune(tmp_path, 1, Mesh.single(), set(), best=2)
    assert [path.name[-1] for path in sound(tmp_path)] == ["2", "4"]


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    """As the first of a run it was, for nothing is better than nan; and no checkpoint can hold it."""
    best = BestEvaluation("loss/validation", patience=2)
    best.note(1, {"loss/validation": math.nan})
    best.note(2, {"loss/validation": 3.0})
    best.note(3, {"loss/validation": -math.inf})
    assert (best.step, best.value, best.waited) == (2, 3.0, 1)


def test_the_best_checkpoint_is_the_one_that_the_resumed_run_knows(tmp_path):
    """The mark of checkpoints that were removed by hand stayed: the step was reached again, with other weights."""
    run = build_run(CONFIG, Mesh.single())
    known = BestEvaluation("loss/validation", 0, step=2, value=1.0)
    for step in (2, 4):
        save(tmp_path, step, run.engine, run.params, run.mesh, {"best": known.saved()})
    BestEvaluation("loss/validation", 0, step=8, value=0.5).mark(tmp_path)
    assert resume(run, tmp_path) == ResumePoint(4, 0, known.saved(), spikes=NONE_LEFT_OUT)
    assert best_or_newest(tmp_path).name == "step_00000002"


def test_two_runs_cannot_have_one_folder(tmp_path):
    """Both wrote one metrics file, and each removed the other's half-written checkpoint."""
    script = (
        "import sys, pathlib; from roots_dist.runs.train.run_folder import hold_folder\nwith "
        "hold_folder(pathlib.Path(sys.argv[1])): pass"
    )
    with hold_folder(tmp_path / "run"):
        other = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, timeout=250
        )
        assert f"process {os.getpid()} on " in other.stderr and "choose another track.folder" in other.stderr
        with pytest.raises(FolderError, match="track.folder = .* Fix: "), hold_folder(tmp_path / "run"):
            pass
    with hold_folder(tmp_path / "run"):
        pass


def test_a_full_disk_is_one_line(tmp_path):
    full_disk = pytest.raises(FolderError, match="track.folder = .*No space left.* Fix: see to the disk")
    with full_disk, hold_folder(tmp_path), open("/dev/full", "w") as full:
        full.write("metrics")
        full.flush()
    with pytest.raises(FileNotFoundError), hold_folder(tmp_path):
        (tmp_path / "nothing").read_text()


def test_a_failure_of_another_file_is_not_said_of_the_runs_folder(tmp_path):
    with pytest.raises(EnvironmentProblem, match="^/etc/hostname/x: Not a directory"), hold_folder(tmp_path / "run"):
        Path("/etc/hostname/x").read_text()
    (tmp_path / "run" / "a").write_text("")
    with pytest.raises(FolderError, match="track.folder = .*plain files"), hold_folder(tmp_path / "run"):
        (tmp_path / "run" / "a" / "b").read_text()
    broken = pytest.raises(FolderError, match="a disk that takes the run's files")
    with broken, hold_folder(tmp_path / "run"):
        raise OSError(errno.EIO, "Input/output error")


def test_a_resumed_run_says_what_changed():
    saved = CONFIG.model_dump(mode="json")
    now = CONFIG.changed({"optim.lr": 0.1, "parallel.tp": 2})
    assert differences(saved, now) == ["parallel.tp = 2 (was 1)", "optim.lr = 0.1 (was 0.0003)"]
    assert differences({}, now) == []


@pytest.mark.parametrize(
    "change",
    [
        {"model.heads": 4},
        {"model.positions": "rotary"},
        {"model.positions": "learned", "data.seq_length": 4},
        {"model.activation": "relu"},
        {"model.layers": 2},
    ],
)
def test_weights_that_fit_another_model_are_refused_all_the_same(tmp_path, change):
    """16 × 16 is two heads or four: the run went on with another function, and its loss jumped."""
    run = build_run(CONFIG, Mesh.single())
    folder = save(tmp_path, 1, run.engine, run.params, run.mesh, {"config": CONFIG.model_dump(mode="json")})
    changed = CONFIG.changed(change)
    with pytest.raises(ConfigError) as error:
        refuse_another_model(folder, changed)
    key = "data.seq_length" if "data.seq_length" in change else next(iter(change))
    assert key in [problem.key for problem in error.value.problems]
    refuse_another_model(folder, CONFIG.changed({"model.kv_heads": 2, "model.ffn": 64, "model.dropout": 0.5}))


def test_what_only_follows_from_a_changed_key_is_not_to_be_set_back(tmp_path):
    """model.hidden brought model.head_dim and model.ffn with it, which nobody had set."""
    own = CONFIG.changed({"model.ffn": 48})
    (tmp_path / STATE_FILE).write_text(json.dumps({"config": own.model_dump(mode="json")}))
    for change, keys in (
        ({"model.hidden": 32}, ["model.hidden"]),
        ({"model.heads": 4}, ["model.heads"]),
        ({"model.hidden": 32, "model.ffn": None}, ["model.hidden", "model.ffn"]),
        ({"model.hidden": 32, "model.head_dim": 4}, ["model.hidden", "model.head_dim"]),
    ):
        with pytest.raises(ConfigError) as error:
            refuse_another_model(tmp_path, own.changed(change))
        assert [problem.key for problem in error.value.problems] == keys, change


def test_a_folder_of_another_model_is_refused_before_any_process_starts(tmp_path, monkeypatch, capsys):
    """It was told after all ranks had started, in seconds and by rank 0."""
    with Writer(tmp_path / "text", np.dtype("<u2")) as writer:
        writer.add(np.arange(400, dtype="<u2") % 29)
        writer.commit()
    folder = tmp_path / "run"
    folder.mkdir()
    own = {"data.train": tmp_path / "text", "track.folder": folder, "train.device": "cpu", "parallel.tp": 2}
    config = CONFIG.changed(own)
    run = build_run(CONFIG, Mesh.single())
    for step in (1, 2):
        saved = CONFIG.changed({"model.layers": step}).model_dump(mode="json")
        save(folder, step, run.engine, run.params, run.mesh, {"config": saved})
    with pytest.raises(ConfigError) as error:
        refuse_another_model(folder / "checkpoints" / step_name(2), config)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(local, "launch", lambda *_, **__: pytest.fail("it has started ranks"))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2 and capsys.readouterr().err == error.value.cli_message() + "\n"
    refuse_to_resume(config.changed({"checkpoint.resume": False}))
    (folder / "checkpoints" / step_name(2) / STATE_FILE).write_text("{}")
    refuse_to_resume(config)  # the ranks take the one before, whose model is this one
    (folder / "checkpoints.url").write_text("memory://elsewhere/run")
    refuse_to_resume(config.changed({"model.layers": 3}))


def test_samples_may_be_of_another_length_where_the_learned_positions_stay(tmp_path):
    learned = CONFIG.changed({"model.positions": "learned", "data.seq_length": 32})
    (tmp_path / STATE_FILE).write_text(json.dumps({"config": learned.model_dump(mode="json")}))
    refuse_another_model(tmp_path, learned.changed({"data.seq_length": 16, "model.max_positions": 32}))
    for seq, fix in (
        (64, "Fix: set it back, choose another"),
        (16, "Fix: set it back, set model.max_positions=32 for shorter samples, choose"),
    ):
        with pytest.raises(ConfigError) as error:
            refuse_another_model(tmp_path, learned.changed({"data.seq_length": seq}))
        (problem,) = error.value.problems
        assert f"data.seq_length = {seq}: expected 32, the number of learned positions in" in str(
            problem
        ) and fix in str(problem)
    with pytest.raises(ConfigError, match="model.max_positions = 64: expected 32 as in"):
        refuse_another_model(tmp_path, learned.changed({"model.max_positions": 64}))


def test_a_head_of_other_labels_or_adapters_of_another_scale_are_another_model(tmp_path):
    """Both have the same names and shapes."""
    task = CONFIG.changed({"objective.name": "classify", "finetune.labels": ("a", "b"), "finetune.strategy": "lora"})
    (tmp_path / STATE_FILE).write_text(json.dumps({"config": task.model_dump(mode="json")}))
    refuse_another_model(tmp_path, task.changed({"optim.lr": 1e-2}))
    for key, value in (("finetune.labels", ("b", "a")), ("finetune.lora_alpha", 8.0)):
        with pytest.raises(ConfigError, match=key):
            refuse_another_model(tmp_path, task.changed({key: value}))
