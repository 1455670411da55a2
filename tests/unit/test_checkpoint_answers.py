"""A disk or a store that does not answer says nothing of what is there: no checkpoint is set aside, removed or passed
over because of it, and no run begins again."""

from __future__ import annotations

import builtins
import errno
import io
import os
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest
import torch
from test_checkpoint import FakeEngine, saved_alone, stage

from roots_dist.errors import CheckpointError, EnvironmentProblem
from roots_dist.layout import Layout
from roots_dist.runs.train import save_job
from roots_dist.runs.train.save_job import Keeping, SaveJob
from roots_dist.storage.checkpoint import answers, disk
from roots_dist.storage.checkpoint.disk import names
from roots_dist.storage.checkpoint.format import Author, Manifest, checkpoints_folder, keep_at
from roots_dist.storage.checkpoint.keep import remove_leftovers
from roots_dist.storage.checkpoint.object_store import UNFINISHED, ObjectPath, place_of
from roots_dist.storage.checkpoint.object_tensors import open_tensors
from roots_dist.storage.checkpoint.save import shards_of, write_checkpoint
from roots_dist.storage.checkpoint.store_owner import claim
from roots_dist.storage.checkpoint.verified import best_or_newest, newest_verified
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh

ERRORS = {
    "a timeout": TimeoutError("read timed out"),
    "an error of the server": OSError(errno.EIO, "InternalError"),
    "no right": PermissionError("AccessDenied"),
    "an error of its library": RuntimeError("endpoint gone"),
}
QUESTIONS = ("info", "ls", "cat_file", "open")


class Fails:
    """Lets each call fail, but for the first `after`, `count` times."""

    def __init__(self, error: Exception, after: int = 0, count: int = 10**9):
        self.error, self.after, self.left = error, after, count

    def __call__(self, real, is_asked=lambda *args: True):
        def call(*args, **kwargs):
            if is_asked(*args):
                self.after -= 1
                if self.after < 0 and self.left > 0:
                    self.left -= 1
                    raise self.error
            return real(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(answers, "WAITS_S", (0.0, 0.0, 0.0))


@pytest.fixture
def store(tmp_path):
    """A run whose two checkpoints are in a store. Returns its folder."""
    held = fsspec.filesystem("memory")
    held.store.clear()
    held.pseudo_dirs[:] = [""]
    keep_at(tmp_path / "run", "memory://bucket/mine")
    for step in (1, 2):
        saved_alone(tmp_path / "run", step=step)
    return tmp_path / "run"


def break_store(patch, fails, which=QUESTIONS):
    kind = type(fsspec.filesystem("memory"))
    for name in which:
        reads = (lambda self, path, mode="rb", *_: mode == "rb") if name == "open" else lambda *_: True
        patch.setattr(kind, name, fails(getattr(kind, name), reads))


@pytest.mark.parametrize("error", ERRORS)
def test_a_store_that_does_not_answer_is_asked_again_and_then_named(error, store, monkeypatch):
    before = dict(fsspec.filesystem("memory").store)
    calls = 0
    while True:  # from each call on
        with pytest.MonkeyPatch.context() as patch:
            fails = Fails(ERRORS[error], after=calls)
            break_store(patch, fails)
            try:
                found = best_or_newest(store)
            except EnvironmentProblem as problem:
                said = str(problem)
                assert "memory://bucket/mine" in said and "asked 4 times" in said and "Fix: " in said, said
                assert "nothing was changed" in said
            else:
                assert found.name == "step_00000002" and fails.left == 10**9
                break
        assert dict(fsspec.filesystem("memory").store) == before
        calls += 5
    assert calls > 20
    with pytest.MonkeyPatch.context() as patch:
        break_store(patch, Fails(ERRORS[error], after=9, count=3))
        assert best_or_newest(store).name == "step_00000002"


def test_a_key_that_may_look_and_not_list_is_told_which_right_it_lacks(store, tmp_path, monkeypatch):
    """To one who may not list, a store says of what is not there that it is forbidden, not that it is missing."""
    kind, before = type(fsspec.filesystem("memory")), dict(fsspec.filesystem("memory").store)
    info = kind.info

    def look(self, path, **more):
        try:
            return info(self, path, **more)
        except FileNotFoundError:
            raise PermissionError("AccessDenied") from None

    def no_list(self, path, **more):
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(kind, "info", look)
    monkeypatch.setattr(kind, "ls", no_list)
    keep_at(tmp_path / "new", "memory://bucket/new")
    fix = r"Fix: give the key the right to list, read and write there \(.* to one who may not list\)"
    for run in (tmp_path / "new", store):
        with pytest.raises(EnvironmentProblem, match=f"= no answer .*AccessDenied.*{fix}.*nothing was changed"):
            best_or_newest(run)
    assert dict(fsspec.filesystem("memory").store) == before


@pytest.mark.parametrize("garbage", [[{}], [{"name": "bucket/mine/step_00000002"}], ["step_00000002"], 7, None])
def test_a_list_that_is_none_is_no_answer(garbage, store, monkeypatch):
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", lambda *_, **__: garbage)
    with pytest.raises(EnvironmentProblem, match="memory://bucket/mine = no answer"):
        best_or_newest(store)


def test_rows_that_come_short_are_asked_for_again_and_then_no_answer(store, monkeypatch):
    """A proxy that ends a transfer early: the rank ended with a traceback about shapes."""
    folder = checkpoints_folder(store) / "step_00000002"
    tensors = open_tensors(folder / next(name for name in names(folder) if name.startswith("model-")))
    (name, *_) = (name for name in tensors._header if name != "__metadata__")
    whole, real, short = tensors.get_slice(name)[:], ObjectPath.read, [1]
    monkeypatch.setattr(ObjectPath, "read", lambda self, a, b: real(self, a, b)[: -1 if short.pop() else None])
    short[:] = [0, 1, 1]
    assert torch.equal(tensors.get_slice(name)[:], whole) and not short
    short[:] = [1] * 4
    with pytest.raises(EnvironmentProblem, match="= no answer .* were asked for"):
        tensors.get_slice(name)[:]


@pytest.mark.parametrize("what", ["manifest.json", "state.json", "model-"])
def test_one_answer_of_somebody_else_is_no_damage(what, store, monkeypatch):
    """A proxy's page with the status 200: the checkpoint was set aside, and its steps were done again."""
    pages = [b"<html>Please log in</html>"]

    def page(path):
        return pages.pop() if pages and "step_00000002/" + what in str(path) else None

    real_read, real_reading = ObjectPath.read, ObjectPath.reading
    monkeypatch.setattr(ObjectPath, "read", lambda self, *span: page(self) or real_read(self, *span))
    monkeypatch.setattr(
        ObjectPath,
        "reading",
        lambda self: nullcontext(io.BytesIO(found)) if (found := page(self)) else real_reading(self),
    )
    assert best_or_newest(store).name == "step_00000002" and not pages
    pages[:] = [b"<html>"] * 99
    assert best_or_newest(store).name == "step_00000001"


def test_what_may_be_a_checkpoint_is_not_swept_away(store):
    """A manifest that is not seen was taken for none, and the checkpoint for the rest of a killed save."""
    with (place_of("memory://bucket/mine") / "step_00000002" / UNFINISHED).writing() as file:
        file.write(b"is being deleted\n")
    before = dict(fsspec.filesystem("memory").store)
    for calls in range(12):
        with pytest.MonkeyPatch.context() as patch:
            break_store(patch, Fails(TimeoutError("read timed out"), after=calls), ("info",))
            try:
                remove_leftovers(checkpoints_folder(store))
            except EnvironmentProblem:
                assert dict(fsspec.filesystem("memory").store) == before
    remove_leftovers(checkpoints_folder(store))
    assert not (place_of("memory://bucket/mine") / "step_00000002" / UNFINISHED).exists()
    assert newest_verified(store, Mesh.single())[0].name == "step_00000002"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_does_not_answer_is_no_damage_either(number, tmp_path):
    for step in (1, 2):
        saved_alone(tmp_path, step=step)
    names_before = sorted(str(path) for path in tmp_path.rglob("*"))
    newest = lambda path, *_, **__: "step_00000002" in str(path)
    for owner, name in ((os, "stat"), (disk, "read_plain"), (builtins, "open")):
        for count in (1, 10**9):
            with pytest.MonkeyPatch.context() as patch:
                fails = Fails(OSError(number, os.strerror(number)), count=count)
                patch.setattr(owner, name, fails(getattr(owner, name), newest))
                if count == 1:
                    assert newest_verified(tmp_path, Mesh.single()) == (tmp_path / "checkpoints/step_00000002", [])
                    continue
                with pytest.raises(EnvironmentProblem, match=r"step_00000002\S* = no answer .*Fix: see to "):
                    best_or_newest(tmp_path)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names_before
    (tmp_path / "checkpoints/step_00000002/state.json").unlink()
    os.mkfifo(tmp_path / "checkpoints/step_00000002/state.json")
    assert best_or_newest(tmp_path).name == "step_00000001", "what is there and is none of its files is damage"


def on_ranks(rank: int, size: int, folder: str) -> str:
    """Rank 1's disk does not answer."""
    mesh = Mesh.connect(Layout(dp=size), rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "WAITS_S", (0.0,))
        if rank == 1:
            patch.setattr(builtins, "open", Fails(OSError(errno.EIO, "Input/output error"))(open))
        try:
            newest_verified(Path(folder), mesh)
        except EnvironmentProblem as error:
            return str(error)
    return ""


def test_all_ranks_know_of_the_one_whose_disk_does_not_answer(tmp_path):
    for step in (1, 2):
        saved_alone(tmp_path, step=step)
    first, second = on_warm_world(2, on_ranks, str(tmp_path))
    assert first == second and first.startswith("rank 1 (") and "Input/output error" in first


def test_a_save_that_cannot_be_read_back_has_failed_and_keeps_its_name(store, monkeypatch):
    folder, mesh = checkpoints_folder(store), Mesh.single()
    keeping = Keeping(store, 1, 2, None, {2})

    def written(*args):
        break_store(monkeypatch, Fails(TimeoutError("read timed out")))
        return folder / "step_00000002"

    monkeypatch.setattr(save_job, "write_checkpoint", written)
    with pytest.raises(CheckpointError, match="memory://bucket/mine/step_00000002/manifest.json = no answer"):
        SaveJob(store, 2, {}, Author(), (), keeping).run(mesh)
    monkeypatch.undo()
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_a_save_has_failed_wherever_in_it_the_store_falls_silent(store):
    """Before its first word it ended the run instead, although training goes on after a save that fails."""
    calls = 0
    while True:  # from each call on
        with pytest.MonkeyPatch.context() as patch:
            break_store(patch, Fails(TimeoutError("read timed out"), after=calls))
            try:
                saved_alone(store, step=3)
            except CheckpointError:  # and no other error
                pass
            else:
                break
        remove_leftovers(checkpoints_folder(store))
        assert newest_verified(store, Mesh.single())[0].name in ("step_00000002", "step_00000003")
        calls += 1
    assert calls > 8


def test_an_earlier_start_neither_replaces_nor_removes_what_a_later_one_saves_meanwhile(store):
    first, second = (Author("same run", attempt, order="", start=f"start {attempt}") for attempt in (1, 2))
    claim(store, first)
    place, params = checkpoints_folder(store) / "step_00000003", stage(Mesh.single())

    def meanwhile():
        yield from shards_of(FakeEngine(params, seed=0), params, Mesh.single())
        claim(store, second)
        saved_alone(store, step=3, author=second)

    with pytest.raises(CheckpointError, match="another has begun there since"):
        write_checkpoint(store, 3, meanwhile(), {"format": 2, "step": 3, "taken": {}}, Mesh.single(), first)
    assert Manifest.read(place).author.attempt == 2
    assert newest_verified(store, Mesh.single())[0] == place
