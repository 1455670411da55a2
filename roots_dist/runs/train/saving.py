"""Save checkpoints while training goes on: a save that fails is said and tried again, and one that succeeded is read
back before an older one is deleted.

    checkpoint --save, damage_of--> best.json, prune
               --failed--> a warning, again after 1, 2, 4, … steps --checkpoint.max_failures in a row, or the run's last
                           save--> once more in checkpoint.fallback_folder; the run stops
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from roots_dist.errors import CheckpointError, Problem
from roots_dist.runs.train.copies import check_copies
from roots_dist.runs.train.state import TrainState
from roots_dist.storage.checkpoint.disk import make_folder
from roots_dist.storage.checkpoint.format import checkpoints_folder
from roots_dist.storage.checkpoint.run_identity import mark_saved
from roots_dist.storage.checkpoint.save import save
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.storage.checkpoint.verified import damage_of, prune, set_all_aside

log = logging.getLogger(__name__)


def checkpoint(state: TrainState, *, last: bool = False) -> Path | None:
    """Save a checkpoint, delete those that are not kept, and return its folder; None if it failed and training goes on.
    `last`: the run ends with it, and it may be in checkpoint.fallback_folder. Collective over the world.

    Raises CheckpointError on all ranks if it fails and was the last one, or checkpoint.max_failures failed in a row.
    """
    since, before = time.perf_counter(), state.saves.step
    with state.trackers.doing("saving ..."), state.mesh.progress.during("save"):
        try:
            path = _save_and_read_back(state, state.folder)
        except CheckpointError as error:
            if (elsewhere := _after_failure(state, error, last)) is None:
                return None
            path = elsewhere
        else:
            state.saves.succeeded(state.step)
            _keep(state, before)
    state.trackers.log(state.step, {"time/checkpoint_s": time.perf_counter() - since})
    state.trackers.checkpoint(state.step, path)
    for callback in state.on_checkpoint:
        callback(state, path)
    return path


def _save_and_read_back(state: TrainState, folder: Path) -> Path:
    """Save, and compare what was in memory with what the disk gives back. Raises CheckpointError on all ranks."""
    check_copies(state.run, state.step)  # what has drifted apart is never saved
    config, best = state.config.model_dump(mode="json"), state.best
    saved = {"tokens": state.tokens, "skipped": state.skipped, "config": config, "best": best and best.saved()}
    saved |= state.spikes.saved()
    author = state.saves.author
    path = save(folder, state.step, state.run.engine, state.run.params, state.mesh, saved, author=author)
    why = damage_of(path, state.step, author.run, state.mesh)
    if why:
        aside = SharedFailure(state.mesh)
        if state.mesh.rank == 0:
            with aside.attempt(f"cannot rename {path}"):
                set_all_aside([(path, why)])
        raise CheckpointError(aside.on_all() or why)
    return path


def _keep(state: TrainState, before: int) -> None:
    """Mark the best checkpoint, then delete older ones. `before`: step of the checkpoint before this one; if there
    was a better evaluation since, whose save has failed, this one takes its place. A failure is only said: the new
    checkpoint is in place."""
    tidied, best = SharedFailure(state.mesh), state.best
    if state.mesh.rank == 0:
        with tidied.attempt(f"cannot note in {state.folder} that it has a checkpoint"):
            mark_saved(state.folder)
    if state.mesh.rank == 0 and best and best.step and (best.step == state.step or best.step > before):
        with tidied.attempt(f"cannot mark the best checkpoint of {state.folder}"):
            best.mark(state.folder, state.step)
        if best.step < state.step:
            why = "the best evaluation, after step %d, has no checkpoint: that of step %d is marked in its place"
            log.warning(why, best.step, state.step)
    why = tidied.on_all()
    if not why:
        with tidied.attempt(f"cannot delete the oldest checkpoints of {state.folder}"):
            prune(state.folder, state.config.checkpoint.keep, state.mesh, state.saves.verified)
        why = tidied.on_all()
    if why:
        log.warning("%s", why)


def _after_failure(state: TrainState, error: CheckpointError, last: bool) -> Path | None:
    """Say that a save has failed, and decide whether training goes on. Returns where the last one was made instead."""
    saves = state.saves
    keys = state.config.checkpoint
    saves.failed(state.step, keys.every)
    many = saves.failures >= keys.max_failures
    told = f"the checkpoint of step {state.step} could not be saved ({saves.failures} in a row): {error}"
    if not (last or many):
        log.warning("%s Training goes on; the next attempt is after step %d", told, saves.next_try)
        return None
    where = "none is set"
    if keys.fallback_folder is not None:
        folder = Path(keys.fallback_folder)
        log.warning("%s A last attempt is made in %s", told, folder)
        try:
            path = save_elsewhere(state, folder)
        except CheckpointError as again:
            where = f"that failed too: {again}"
        else:
            _note_elsewhere(state)
            where = f"{move_it(state, path)} and repeat the command"
            if last:
                log.warning("the checkpoint of step %d is not in the run's folder: %s", state.step, where)
                saves.succeeded(state.step, path)
                return path
    if not many:
        raise CheckpointError(f"{told} checkpoint.fallback_folder: {where}")
    problem = Problem(
        key="checkpoint.max_failures",
        found=keys.max_failures,
        expected=f"fewer saves in a row to fail; {told} checkpoint.fallback_folder: {where}",
        fix="see to the disk and repeat the command: it goes on from the newest checkpoint",
    )
    raise CheckpointError(str(problem))


def move_it(state: TrainState, path: Path) -> str:
    """Where the newest checkpoint is, if not in the run's folder, and what to do with it."""
    return f"its checkpoint is in {path}: move it to {checkpoints_folder(state.folder)}"


def _note_elsewhere(state: TrainState) -> None:
    """Note in the run's folder that the run has a checkpoint, so that it never begins at step 0 in silence. A failure
    is only said: the disk of that folder may be full. Collective over the world."""
    noted = SharedFailure(state.mesh)
    if state.mesh.rank == 0:
        with noted.attempt(f"cannot note in {state.folder} that the run has a checkpoint"):
            mark_saved(state.folder)
    if why := noted.on_all():
        log.warning("%s", why)


def save_elsewhere(state: TrainState, folder: Path) -> Path:
    """Save in another folder, which is made if needed. Collective over the world; raises CheckpointError on all
    ranks."""
    made = SharedFailure(state.mesh)
    if state.mesh.rank == 0:
        with made.attempt(f"cannot make {folder}"):
            for path in reversed([folder, *folder.parents]):
                if not path.exists():
                    make_folder(path)
    made.raise_on_all()
    return _save_and_read_back(state, folder)
