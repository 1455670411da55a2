"""What may lie in a run's folder, or happen to it, that no run has put there: each was a traceback, a wait, a lost file
or a file that was written somewhere else."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.errors import CheckpointError, EnvironmentProblem
from roots_dist.failures import write_if_possible
from roots_dist.files import write_atomically
from roots_dist.runs.ranks import local
from roots_dist.runs.ranks.failure_report import summarize
from roots_dist.runs.ranks.handshake import Identity
from roots_dist.runs.ranks.stop_signal import read_end
from roots_dist.runs.ranks.watchdog import _process
from roots_dist.runs.report.run_record import read_runs
from roots_dist.runs.track.curve import draw_curve
from roots_dist.runs.track.line_file import LineFile
from roots_dist.runs.track.metrics import METRICS_FILE, MetricsFile, last_step, read_lines
from roots_dist.runs.track.wandb import ID_FILE, _identity
from roots_dist.runs.train.origin import _of_import
from roots_dist.runs.train.repeats import FAILURES_FILE, read_failures
from roots_dist.runs.train.resume import resume
from roots_dist.runs.train.run_folder import FolderError, hold_folder
from roots_dist.storage.checkpoint.format import MANIFEST
from roots_dist.storage.checkpoint.keep import BEST_FILE, best_step
from roots_dist.storage.checkpoint.run_identity import ID, RUN_FILE, begin_attempt
from roots_dist.storage.checkpoint.save import save
from roots_dist.world.mesh import Mesh

CONFIG = Config.model_validate(
    {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 29},
        "data": {"seq_length": 8},
        "train": {"global_batch": 1},
    }
)
TERABYTE = 1 << 40


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of two steps."""
    made = build_run(CONFIG, Mesh.single())
    for step in (1, 2):
        save(tmp_path, step, made.engine, made.params, made.mesh, {})
    return tmp_path


def sparse(path: Path) -> None:
    """Make a file of a terabyte that takes no room on the disk."""
    path.touch()
    os.truncate(path, TERABYTE)


def test_a_file_of_a_terabyte_is_damage_and_fills_no_memory(run):
    sparse(run / "checkpoints" / "step_00000002" / MANIFEST)
    for name in (RUN_FILE, BEST_FILE, FAILURES_FILE, "ended.txt", METRICS_FILE):
        sparse(run / name)
    assert resume(build_run(CONFIG, Mesh.single()), run).step == 1
    assert "are more than any file of its kind has" in (run / "checkpoints" / "step_00000002.damaged.txt").read_text()
    assert best_step(run) is None and read_failures(run) == [] and read_end(run / "ended.txt") == ""
    assert last_step(run / METRICS_FILE) == -1


def test_a_line_of_metrics_that_is_nested_a_million_times_is_skipped(tmp_path, caplog):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n' + "[" * 1_000_000 + '\n{"step": 3}\n')
    assert [line["step"] for line in read_lines(tmp_path / METRICS_FILE)] == [1, 3]
    assert "line 2: not a record" in caplog.text


def test_a_pipe_and_a_nested_record_of_origin_let_nobody_wait(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n')
    os.mkfifo(tmp_path / "origin.json")
    (tmp_path / "summary.json").write_text("[" * 1_000_000)
    (record,) = read_runs([tmp_path], ())
    assert record.origin == record.summary == {} and _of_import(tmp_path / "origin.json") == {}
    (tmp_path / "origin.json").unlink()
    (tmp_path / "origin.json").write_text("[1]")
    assert _of_import(tmp_path / "origin.json") == {}


def test_names_that_are_no_text_or_several_lines_are_told_on_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in (b"\xff\xfe", b"a\nb \x1b[31m"):
        (Path(os.fsdecode(os.fsencode(tmp_path / "checkpoints") + b"/" + name))).touch()
    with pytest.raises(CheckpointError) as error:
        resume(build_run(CONFIG, Mesh.single()), tmp_path)
    said = str(error.value)
    assert said.isprintable() and r"a\nb \x1b[31m" in said and "Fix: " in said


@pytest.mark.parametrize("name", ["errors", "tensorboard", "wandb", "extensions"])
def test_a_link_in_the_place_of_a_folder_is_not_followed(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(FolderError, match=f"no link.*run/{name}.* Fix: remove what is there"),
        hold_folder(tmp_path / "run"),
    ):
        pass
    write_if_possible(tmp_path / "run" / "errors" / "rank_00000.txt", "Traceback")
    write_if_possible(tmp_path / "run" / "errors" / "hang-1" / "rank_0.json", "{}")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss/train": 2.0}\n')
    for name in ("curve.png", ID_FILE):
        (tmp_path / f"{name}.other").touch()
        (tmp_path / name).symlink_to(tmp_path / f"{name}.other")
    draw_curve(tmp_path / METRICS_FILE, tmp_path / "curve.png")
    assert len(_identity(tmp_path / ID_FILE, is_new=True)) == 8
    for name in ("curve.png", ID_FILE):
        assert not (tmp_path / f"{name}.other").read_bytes() and (tmp_path / name).read_bytes()


def test_an_id_that_a_full_disk_has_cut_off_is_made_anew(tmp_path):
    """It was empty, and went on so."""
    (tmp_path / ID_FILE).touch()
    assert (made := _identity(tmp_path / ID_FILE, is_new=False)) == _identity(tmp_path / ID_FILE, is_new=False)
    assert len(made) == 8


def test_lines_of_a_file_that_was_removed_go_into_a_new_one(tmp_path, caplog):
    """They went into a file without a name, in silence, to the run's end."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    folder.mkdir()
    lines = LineFile(folder / "m")
    lines.write("1\n")
    (folder / "m").unlink()
    lines.write("2\n")
    assert (folder / "m").read_text() == "2\n" and caplog.text.count("was removed or renamed") == 1
    (folder / "m").rename(folder / "m.1")
    lines.write("3\n")
    assert (folder / "m").read_text() == "3\n" and (folder / "m.1").read_text() == "2\n"
    folder.rename(moved)  # the lines stay with the run
    folder.mkdir()
    lines.write("4\n")
    assert (moved / "m").read_text() == "3\n4\n" and not any(folder.iterdir())
    for path in moved.iterdir():
        path.unlink()
    moved.rmdir()
    caplog.clear()
    lines.write("5\n")  # the loop ends the run, and says why
    lines.close()
    assert not caplog.text


@pytest.mark.parametrize("name", [METRICS_FILE, "texts.jsonl"])
@pytest.mark.parametrize("odd", ["a link to nothing", "a folder"])
def test_what_is_no_file_of_lines_is_named_with_its_folder(name, odd, tmp_path):
    """By a number of the kernel, or as if it lay elsewhere."""
    path = tmp_path / name
    path.mkdir() if odd == "a folder" else path.symlink_to("nowhere/x")
    with pytest.raises(FolderError, match=f"plain files and folders .*{path}"), hold_folder(tmp_path):
        MetricsFile(tmp_path)


def test_two_threads_that_write_one_file_leave_one_of_both(tmp_path):
    """A thread that is told of a signal, and one that fails: the second could publish the first's unfinished file."""
    failed = []

    def write(number: int) -> None:
        try:
            for _ in range(50):
                write_atomically(tmp_path / "ended.txt", str(number) * 5000)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        content = (tmp_path / "ended.txt").read_text() if (tmp_path / "ended.txt").exists() else ""
        assert not content or (len(content) == 5000 and len(set(content)) == 1)
    assert not failed and [path.name for path in tmp_path.iterdir()] == ["ended.txt"]


@pytest.mark.parametrize(
    "number, expected",
    [
        (errno.EACCES, "files that this user may read and write"),
        (errno.EPERM, "files that this user may read and write"),
        (errno.EFBIG, "a disk that takes the run's files"),
    ],
)
def test_files_of_another_owner_and_limits_of_the_user_are_one_line(number, expected, tmp_path):
    with pytest.raises(FolderError, match=f"{expected} .*Fix: see to "), hold_folder(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / ".lock"))


def test_what_killed_processes_had_begun_to_write_is_removed_once_it_is_old(tmp_path):
    old, young, own, other = (
        tmp_path / name
        for name in (".metrics.jsonl.12-13.partial", ".run.json.12-14.partial", ".my.partial", ".config.yaml.7.partial")
    )
    for path in (old, young, own, other):
        path.touch()
        if path != young:
            os.utime(path, (time.time() - 3600,) * 2)
    with hold_folder(tmp_path):
        assert not old.exists() and not other.exists() and young.exists() and own.exists()


def test_a_lock_whose_content_is_no_text_is_held_all_the_same(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x1b[31m\nmore\n")
    with open(tmp_path / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FolderError) as error, hold_folder(tmp_path):
            pass
    assert str(error.value).isprintable() and "another track.folder" in str(error.value)


def test_a_disk_that_cannot_sync_a_folder_takes_checkpoints(tmp_path, monkeypatch):
    """As some file systems of networks and of user space: no save ever succeeded."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}") or os.path.isdir(f"/dev/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    made = build_run(CONFIG, Mesh.single())
    save(tmp_path, 1, made.engine, made.params, made.mesh, {})
    assert resume(made, tmp_path).step == 1


def test_a_rest_that_cannot_be_removed_stops_no_start(run, monkeypatch, caplog):
    """A file that another node has open keeps its folder on a network's disk."""
    real, rest = os.rmdir, run / "checkpoints" / ".step_00000001.gone"
    rest.mkdir()

    def rmdir(path: Path) -> None:
        if path == rest:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        real(path)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert resume(build_run(CONFIG, Mesh.single()), run).step == 2
    assert "step_00000001.gone cannot be removed" in caplog.text


def test_a_number_of_starts_that_no_manifest_holds_begins_anew(tmp_path):
    """Every checkpoint of that start was called damaged when it was read back."""
    (tmp_path / RUN_FILE).write_text(json.dumps({"id": "x", "attempt": (1 << 63) - 1}))
    assert begin_attempt(tmp_path, "").attempt == 1


PLAIN = ("a", "0123456789abcdef", "my_run-1.b", "a" * 64)


@pytest.mark.parametrize("name", [*PLAIN, "", "a" * 65, "../x", "a/b", ".x", "-x", "a b", "a\n", "é"])
def test_an_id_of_a_run_is_a_plain_name_wherever_it_comes_from(name, tmp_path):
    """It becomes the name of a folder in checkpoint.fallback_folder."""
    is_plain = bool(ID.fullmatch(name))
    assert is_plain == (name in PLAIN)
    try:
        Config.model_validate({"checkpoint": {"url": "s3://b/x", "run_id": name}})
    except ValueError:
        assert not is_plain
    else:
        assert is_plain
    (tmp_path / RUN_FILE).write_text(json.dumps({"id": name, "attempt": 1}))
    author = begin_attempt(tmp_path, "")
    assert (author.run == name) == is_plain and ID.fullmatch(author.run) and author.attempt == 2


def test_a_process_is_known_after_the_clock_was_set_back_by_an_hour(monkeypatch):
    """It was said to have ended, and not killed."""
    own = Identity.own(0, "a")
    real = psutil._psplatform.boot_time
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: real() - 3600)
    assert _process(own) is not None and Identity.own(0, "a").started == pytest.approx(own.started, abs=1)


def test_a_corpus_that_was_cut_short_under_a_run_is_not_called_a_lack_of_memory():
    said = summarize([], {0: -7}, 2).text
    assert "rank 0 was killed by SIGBUS: a file that it reads through the memory was cut short" in said


def test_no_room_for_temporary_files_is_one_line(monkeypatch):
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/roots-x")

    monkeypatch.setattr(local.tempfile, "mkdtemp", full)
    with pytest.raises(EnvironmentProblem, match="TMPDIR = /tmp/roots-x: .*no space left.* Fix: make room"):
        local.launch(2, ["-c", "0"])
