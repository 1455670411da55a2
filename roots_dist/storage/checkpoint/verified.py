"""Choose the checkpoint of a run: the newest whose every hash is right. Damaged ones are named, and the one before
is next.

    keep.py: what looks like one --rank 0: manifest, run, step, sizes, state--> hashes, divided among ranks --> verified

What one rank reads otherwise than rank 0 is no damage but a disk that is not shared: nothing is set aside for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from roots_dist.config.load import CONFIG_FILE, read_record
from roots_dist.errors import CheckpointError, EnvironmentProblem, UserError
from roots_dist.storage.checkpoint.disk import remove, rename, sync_folder, write_file
from roots_dist.storage.checkpoint.folder_lock import lock_folder
from roots_dist.storage.checkpoint.format import Manifest, checkpoints_folder, step_name
from roots_dist.storage.checkpoint.keep import (
    GONE,
    REPLACED,
    best_step,
    check_complete,
    found_steps,
    set_damaged_aside,
)
from roots_dist.storage.checkpoint.object_store import UNFINISHED, ObjectPath, Place
from roots_dist.storage.checkpoint.run_identity import run_id
from roots_dist.storage.checkpoint.same_model import refuse_another_model
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.storage.checkpoint.store_owner import refuse_another_runs
from roots_dist.world.mesh import Mesh

log = logging.getLogger(__name__)

Damages = list[tuple[Place, str]]
"""Damaged checkpoints, each with its reason."""


def damage_of(folder: Place, step: int, run: str, mesh: Mesh) -> str:
    """The reason why a checkpoint cannot be trusted, in words; empty if everything in it is as it was written. Every
    file is read once, by one rank. Collective over the world, equal on every rank. `run`: id that it must have; empty
    for any.

    What comes from a store is asked for a second time before it is called damaged: a proxy may have answered with a
    page of its own, or a transfer have broken. Raises CheckpointError if ranks do not see the same folder,
    EnvironmentProblem if a disk or a store does not answer.
    """
    if isinstance(folder, ObjectPath):
        with suppress(CheckpointError):  # of all ranks
            if not _damage_of(folder, step, run, mesh):
                return ""
    return _damage_of(folder, step, run, mesh)


def _damage_of(folder: Place, step: int, run: str, mesh: Mesh) -> str:
    looked = SharedFailure(mesh)
    if mesh.rank == 0:
        with looked.attempt(f"cannot read {folder}"):
            check_complete(folder, step, run)
    if why := looked.on_all():
        return why
    shared = SharedFailure(mesh)
    with shared.attempt(f"cannot read {folder}"):
        manifest = Manifest.read(folder)
        for name in manifest.files:
            manifest.check_size(folder, name)
    if why := shared.on_all():
        raise CheckpointError(f"{why} Rank 0 reads it whole. Fix: put the run's folder on a disk that all nodes share.")
    names = sorted(manifest.files)
    numbers = range(mesh.world.rank, len(names), mesh.world.size)
    found = len(names)
    with shared.attempt(f"cannot read {folder}"):
        found = next((n for n in numbers if _differs(manifest, folder, names[n], mesh)), len(names))
    shared.raise_on_all()  # where a rank's disk or store does not answer
    bad = torch.tensor(found)
    if mesh.world.size > 1:
        bad = bad.to(mesh.device)
        dist.all_reduce(bad, op=dist.ReduceOp.MIN, group=mesh.world.group)
    if (first := int(bad)) == len(names):
        return ""
    if mesh.rank == 0:
        with looked.attempt(f"cannot read {folder}"):
            manifest.check_hash(folder, names[first])
    if why := looked.on_all():
        return why
    raise CheckpointError(
        f"{folder / names[first]}: a rank reads other bytes than rank 0. Fix: look after the disk or the network of "
        "its node; the file itself is sound."
    )


def _differs(manifest: Manifest, folder: Place, name: str, mesh: Mesh) -> bool:
    mesh.progress.move()
    try:
        manifest.check_hash(folder, name)
    except (CheckpointError, OSError):
        return True
    return False


def newest_verified(run: Path, mesh: Mesh, first: Sequence[int] = ()) -> tuple[Place | None, Damages]:
    """The newest checkpoint that can be trusted, or the one of a step in `first`; None if there is none. And those that
    came before it and cannot, which only rank 0 knows. Collective over the world."""
    folder, damages = checkpoints_folder(run), Damages()
    found, run_of_folder = _listed(run, mesh)
    order = iter([*(step for step in first if step in found), *(step for step in reversed(found) if step not in first)])
    while (place := _from_rank_0(mesh, _places(found, order))) is not None:
        step, replaced = divmod(place, 2)
        path = folder / (f".{step_name(step)}{REPLACED}" if replaced else step_name(step))
        why = damage_of(path, step, run_of_folder, mesh)
        if not why:
            return path, damages
        damages.append((path, why))
        if mesh.rank == 0:
            log.warning("%s cannot be trusted, the one before is tried: %s", path, why)
    return None, damages


def _listed(run: Path, mesh: Mesh) -> tuple[dict[int, Place], str]:
    """Everything with the name of a checkpoint, by step, and the run's id, on rank 0; nothing on the others. Raises
    CheckpointError on all ranks if rank 0 cannot read the folder. Collective over the world."""
    listed, found, own = SharedFailure(mesh), dict[int, Place](), ""
    if mesh.rank == 0:
        with listed.attempt(f"cannot read {run}"):
            refuse_another_runs(run)
            found, own = found_steps(run), run_id(run)
    listed.raise_on_all()
    return found, own


def _places(found: dict[int, Place], order: Iterator[int]) -> int | None:
    step = next(order, None)
    return None if step is None else 2 * step + found[step].name.endswith(REPLACED)


def _from_rank_0(mesh: Mesh, value: int | None) -> int | None:
    """The number that rank 0 has; the others may see files of a shared folder late. Collective over the world."""
    told = torch.tensor([0 if mesh.rank or value is None else value + 1], dtype=torch.int64, device=mesh.device)
    number = int(mesh.world.sum_(told).item())
    return number - 1 if number else None


def best_or_newest(run: Path, mesh: Mesh | None = None) -> Place:
    """The checkpoint to read a run's model from: the best one, or else the newest, every hash compared. Damaged ones
    are set aside, if no training run holds the folder. Collective over the mesh, which a single process may omit.

    Raises CheckpointError if there is none, and ConfigError if the run's config.yaml says another model.
    """
    run, mesh = Path(run), mesh or Mesh.single()
    marked = best_step(run) if mesh.rank == 0 else None
    found, damages = newest_verified(run, mesh, [] if marked is None else [marked])
    if found is None:
        held = f": {damages[0][1]}" if damages else ""
        raise CheckpointError(
            f"{run} holds no complete checkpoint{held}. Fix: train it first, or name another run's folder."
        )
    if mesh.rank == 0 and damages:
        try:
            with lock_folder(run):
                set_all_aside(damages)
        except (UserError, OSError) as error:
            log.info("what is damaged keeps its name for now: %s", error)
    if (run / CONFIG_FILE).is_file():
        fix = f"put back the {CONFIG_FILE} that the run has written"
        refuse_another_model(found, read_record(run / CONFIG_FILE), fix)
    return found


def set_all_aside(damages: Damages) -> None:
    """Rename damaged checkpoints. Rank 0 calls it while it holds the folder."""
    for path, why in damages:
        log.warning("%s is now called %s", path, set_damaged_aside(path, why).name)


def prune(run: Path, keep: int, mesh: Mesh, verified: set[int], best: int | None = None) -> None:
    """Delete all checkpoints but the newest `keep` that can be trusted, the one that the folder marks as the best, and
    that of step `best`, which the file may have ceased to tell. `verified` are the steps of which
    this process knows that; it grows by those that are compared here. Damaged ones do not count and are set aside;
    other folders are not touched. Collective over the world."""
    assert keep >= 1, keep
    found, run_of_folder = _listed(run, mesh)
    order, kept = iter(reversed(found)), 0
    while kept < keep and (step := _from_rank_0(mesh, next(order, None))) is not None:
        path = checkpoints_folder(run) / step_name(step)
        why = "" if step in verified else damage_of(path, step, run_of_folder, mesh)
        if not why:
            verified.add(step)
            kept += 1
        elif mesh.rank == 0:
            try:
                set_all_aside([(path, why)])
            except (OSError, EnvironmentProblem) as error:  # the other ranks go on
                log.warning("%s cannot be set aside (%s): %s", path, error, why)
    marked = {best_step(run), best} if mesh.rank == 0 else set()
    for step in (step for step in order if step not in marked):
        if found[step].is_dir() and not found[step].is_symlink():
            delete(found[step])


def delete(path: Place) -> None:
    """Delete a checkpoint. Renamed first, so that a kill in between leaves nothing that looks complete; in an object
    store it is said to be unfinished."""
    if isinstance(path, ObjectPath):
        write_file(path / UNFINISHED, [b"is being deleted\n"])
        remove(path)
        return
    gone = path.with_name(f".{path.name.strip('.')}{GONE}")
    remove(gone)
    rename(path, gone)
    sync_folder(path.parent)
    remove(gone)
