"""A kill at any moment leaves the old checkpoint or the new one, whole; never something between that counts."""

import hashlib
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
from checkpoints import newest, sound
from test_checkpoint import FakeEngine, saved_alone, stage

from roots_dist.errors import CheckpointError
from roots_dist.layout import Layout
from roots_dist.storage.checkpoint import verified
from roots_dist.storage.checkpoint.disk import hash_file, write_file
from roots_dist.storage.checkpoint.load import load
from roots_dist.storage.checkpoint.verified import newest_verified, prune
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh

KILLABLE = tuple((os, name) for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"))
"""Calls by which a save changes the disk; a kill comes just before one of them."""


def die_before(call: int, *save_args, **save_options) -> bool:
    """Save in a forked process that is killed before its n-th call to the disk. False: it had fewer."""
    pid = os.fork()
    if pid == 0:
        calls = [0]

        def deadly(function):
            def counted(*args, **kwargs):
                calls[0] += 1
                if calls[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return counted

        try:
            for module, name in KILLABLE:
                setattr(module, name, deadly(getattr(module, name)))
            saved_alone(*save_args, **save_options)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) or status == 0, status
    return status != 0


def loaded(folder: Path) -> int:
    """The step of a sound checkpoint, every hash compared."""
    params = stage(Mesh.single())
    return load(folder, FakeEngine(params, seed=None), params, Mesh.single())["step"]


@pytest.mark.parametrize("step", [8, 7], ids=["new step", "same step again"])
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path, step):
    saved_alone(tmp_path, step=7)
    seen, call = set(), 0
    while die_before(call := call + 1, tmp_path, step=step, shard_bytes=20_000):
        found = newest(tmp_path)
        assert found is not None, f"killed before call {call} to the disk, it has left none"
        seen.add(loaded(found))
        if step == 7:
            assert sound(tmp_path) == [found]
        shutil.rmtree(tmp_path / "checkpoints")
        saved_alone(tmp_path, step=7)
    assert call > 15 and seen == {7, step}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_leftovers_of_kills_are_swept_by_the_next_save(tmp_path):
    saved_alone(tmp_path, step=7)
    for call in (1, 5, 20, 31):
        assert die_before(call, tmp_path, step=7, shard_bytes=4000)
    saved_alone(tmp_path, step=8)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000007", "step_00000008"]


def test_the_newest_is_the_newest_that_is_whole(tmp_path):
    assert newest(tmp_path) is None
    good = saved_alone(tmp_path, step=7)
    folder = good.parent
    torn = shutil.copytree(good, folder / "step_00000009")  # the manifest says 7
    (folder / "step_00000010").mkdir()
    cut = saved_alone(tmp_path, step=11)
    next(cut.glob("exp_avg-*")).unlink()
    (folder / "step_00000012").write_text("a file")
    (folder / "notes").mkdir()
    (folder / ".step_00000013.partial").mkdir()
    found, damages = newest_verified(tmp_path, Mesh.single())
    assert found == good and [path.name for path, _ in damages] == [f"step_{step:08d}" for step in (12, 11, 10, 9)]
    assert torn.exists()


def test_prune_keeps_the_newest_sound_ones_and_sets_damaged_ones_aside(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        saved_alone(tmp_path, step=step)
    (tmp_path / "checkpoints" / "step_00000004").mkdir()
    prune(tmp_path, 2, Mesh.single(), set())
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000004.damaged", "step_00000004.damaged.txt", "step_100000000"]
    assert "manifest.json: is missing" in (tmp_path / "checkpoints" / names[2]).read_text()
    prune(tmp_path, 2, Mesh.single(), set())
    assert [p.name for p in sound(tmp_path)] == ["step_00000003", "step_100000000"]


def test_a_checkpoint_counts_for_keep_only_if_its_hashes_are_right(tmp_path):
    """One that had been damaged behind its size took the place of a sound one, which was deleted."""
    for step in (1, 2, 3, 4):
        path = saved_alone(tmp_path, step=step)
        if step == 3:
            shard = next(path.glob("model-*"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    prune(tmp_path, 2, Mesh.single(), {4})
    assert [p.name for p in sound(tmp_path)] == ["step_00000002", "step_00000004"]
    assert (tmp_path / "checkpoints" / "step_00000003.damaged").is_dir()


def test_what_only_has_the_name_of_the_next_step_is_neither_overwritten_nor_deleted(tmp_path):
    saved_alone(tmp_path, step=7)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000008").mkdir()
    (folder / "step_00000008" / "model-00001-of-00001.safetensors").write_text("what is left of it")
    (folder / "step_00000009").symlink_to("nowhere")
    (folder / ".step_00000010.partial").write_text("a file")
    for step in (8, 9, 10):
        saved_alone(tmp_path, step=step)
    assert [p.name for p in sound(tmp_path)] == [f"step_{step:08d}" for step in (7, 8, 9, 10)]
    assert [p.name for p in (folder / "step_00000008.damaged").iterdir()] == ["model-00001-of-00001.safetensors"]
    assert (folder / "step_00000009.damaged").is_symlink()


def test_every_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    for mask in (0o022, 0o007):
        before = os.umask(mask)
        try:
            folder = saved_alone(tmp_path, step=mask + 1)
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


def test_a_bit_that_flips_on_its_way_to_the_disk_does_not_get_a_hash_that_fits(tmp_path, monkeypatch):
    real = os.write

    def flips(fd, block):
        return real(fd, bytes([block[0] ^ 1]) + bytes(block[1:]))

    monkeypatch.setattr(os, "write", flips)
    facts = write_file(tmp_path / "file", [b"abc", memoryview(b"def")])
    assert facts.bytes == 6 and facts.sha256 == hashlib.sha256(b"abcdef").hexdigest()
    assert hash_file(tmp_path / "file").sha256 != facts.sha256


def unlisted(rank: int, size: int) -> list[str]:
    said, mesh = [], Mesh.connect(Layout(dp=size), rank)
    with mock.patch.object(verified, "found_steps", side_effect=OSError("no answer")):
        for listing in (
            lambda: prune(Path("run"), 1, mesh, set()),
            lambda: verified.newest_verified(Path("run"), mesh),
        ):
            try:
                listing()
            except CheckpointError as error:
                said.append(str(error))
    return said


def test_a_folder_that_rank_0_cannot_list_fails_all_ranks_together():
    """Rank 0 went on to the next message, of another kind than the one that the others waited for."""
    found = on_warm_world(2, unlisted)
    assert found[0] == found[1] and all("cannot read run: no answer" in said for said in found[0])
    assert len(found[0]) == 2
