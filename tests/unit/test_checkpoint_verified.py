"""Which checkpoint is taken: every file of it is read by some rank, and what one rank finds all of them know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoints import sound
from test_checkpoint import saved_alone

from roots_dist.layout import Layout
from roots_dist.storage.checkpoint.format import Manifest
from roots_dist.storage.checkpoint.keep import BEST_FILE
from roots_dist.storage.checkpoint.verified import damage_of, newest_verified, prune
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def damages(rank: int, size: int, folder: str) -> list[str]:
    """What is said of the checkpoint as each of its files is damaged in turn, and of the sound one."""
    mesh, found = Mesh.connect(Layout(dp=size), rank), []
    for name in (*sorted(Manifest.read(Path(folder)).files), None):
        if rank == 0 and name:
            flip(Path(folder) / name)
        dist.barrier()
        found.append(damage_of(Path(folder), 7, "", mesh))
        dist.barrier()
        if rank == 0 and name:
            flip(Path(folder) / name)
    return found


def test_damage_that_one_rank_reads_is_known_to_all(tmp_path):
    folder = saved_alone(tmp_path, shard_bytes=4000)
    names = sorted(Manifest.read(folder).files)
    first, second = on_warm_world(2, damages, str(folder))
    assert first == second and len(names) > 6
    assert first[-1] == "" and all(name in said for name, said in zip(names, first[:-1]))


def test_the_newest_sound_one_is_taken_or_the_one_that_is_asked_for(tmp_path):
    paths = [saved_alone(tmp_path, step=step) for step in (1, 2, 3)]
    assert newest_verified(tmp_path, Mesh.single()) == (paths[2], [])
    assert newest_verified(tmp_path, Mesh.single(), [1]) == (paths[0], [])
    assert newest_verified(tmp_path, Mesh.single(), [9]) == (paths[2], [])
    flip(next(paths[2].glob("exp_avg-*")))
    found, damaged = newest_verified(tmp_path, Mesh.single())
    assert found == paths[1] and [path for path, _ in damaged] == [paths[2]]


def test_the_best_one_is_kept_however_old_it_is(tmp_path):
    for step in (1, 2, 3, 4):
        saved_alone(tmp_path, step=step)
    (tmp_path / BEST_FILE).write_text(json.dumps({"step": 1}))
    prune(tmp_path, 2, Mesh.single(), set())
    assert [path.name[-1] for path in sound(tmp_path)] == ["1", "3", "4"]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_checkpoint_that_a_killed_save_had_set_aside_comes_back(tmp_path, is_there):
    """It was killed between its two renames, or behind the second."""
    old = saved_alone(tmp_path, step=7)
    old.rename(old.with_name(f".{old.name}.replaced"))
    if is_there:
        (tmp_path / "again").mkdir()
        saved_alone(tmp_path / "again", step=7).rename(old)
    saved_alone(tmp_path, step=8)
    assert sorted(path.name for path in old.parent.iterdir()) == ["step_00000007", "step_00000008"]
