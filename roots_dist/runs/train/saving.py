"""Save checkpoints while training goes on: in the background, from a copy; a save that fails is said and tried again,
and one that succeeded is read back before an older one is deleted.

    checkpoint --a copy--> BackgroundSave (save_job.py) --poll, after each step--> over: settle
               --failed--> a warning, again after 1, 2, 4, … steps --checkpoint.max_failures in a row, or the run's last
                           save--> once more in checkpoint.fallback_folder; the run stops

One save is under way at most. Whoever stops waits for it, and saves the last step itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from roots_dist.errors import CheckpointError, Problem
from roots_dist.runs.train.copies import check_copies
from roots_dist.runs.train.save_job import BackgroundSave, Keeping, SaveJob
from roots_dist.runs.train.state import TrainState
from roots_dist.storage.checkpoint.disk import make_folder
from roots_dist.storage.checkpoint.format import checkpoints_folder
from roots_dist.storage.checkpoint.object_store import Place, place_of
from roots_dist.storage.checkpoint.run_identity import mark_saved
from roots_dist.storage.checkpoint.save import in_new_memory, shards_of, with_facts
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.world.words import words_of

log = logging.getLogger(__name__)

GOES_ON, OVER, LATE, DEAD = range(4)
"""States of the thread of a rank that saves in the background."""
LOOK_S = 0.1
"""Seconds between two looks at a thread that is waited for."""
GRACE_S = 0.5
"""Seconds in which a save that stands still for too long may go on, before the run is ended."""
ENDED_S = 60.0
"""Seconds in which the watchdog ends a process that has told it of a hang; it takes one or two."""
NAMELESS = "run"
"""Folder in checkpoint.fallback_folder of a run without an id, as a part of the loop that runs alone."""


def checkpoint(state: TrainState, *, last: bool = False) -> Place | None:
    """Save a checkpoint, delete those that are not kept, and return its folder; None if that goes on in the background,
    or failed and training goes on. `last`: the run ends with it, and it may be in checkpoint.fallback_folder.
    Collective over the world.

    Raises CheckpointError on all ranks if it fails and was the last one, or checkpoint.max_failures failed in a row.
    """
    since, saves = time.perf_counter(), state.saves
    if saves.under_way is not None:
        _say_that_it_waits(state, saves.under_way.job.step)
        settle(state)
    with state.trackers.doing("saving ..."), state.mesh.progress.during("save"):
        if saves.background is not None and not last:
            job = _job(state, state.folder, saves.copies)
            saves.under_way = BackgroundSave(replace(job, shards=tuple(job.shards)), saves.background)
            saves.next_try = 0  # this save is the next attempt
            state.trackers.log(state.step, {"time/checkpoint_s": time.perf_counter() - since})
            return None
        try:
            path = _job(state, state.folder).run(state.mesh)
        except CheckpointError as error:
            if (elsewhere := _after_failure(state, state.step, error, last)) is None:
                return None
            path = elsewhere
        else:
            saves.succeeded(state.step)
    state.trackers.log(state.step, {"time/checkpoint_s": time.perf_counter() - since})
    _tell(state, state.step, path)
    return path


def save_last(state: TrainState) -> None:
    """Finish the save that is under way, and save the last step if it was another. Collective over the world; raises as
    `checkpoint` does."""
    settle(state)
    if state.saves.step < state.step:
        checkpoint(state, last=True)


def poll(state: TrainState) -> None:
    """Take note of the save that is under way: if it is over on all ranks, of what became of it; if a rank's thread has
    died, or has not moved for as long as a save may stand still, end the run. Costs one small message while a save is
    under way. Collective over the world; raises as `checkpoint` does."""
    under_way, mesh = state.saves.under_way, state.mesh
    if under_way is None:
        return
    is_late = under_way.still_s > _limit_s(state)
    mine = DEAD if under_way.death else OVER if under_way.is_over else LATE if is_late else GOES_ON
    told = torch.zeros(mesh.world.size, dtype=torch.int64, device=mesh.device)
    told[mesh.world.rank] = mine
    found = mesh.world.sum_(told).tolist()
    if DEAD in found:
        _end_without_writer(state, under_way, found.index(DEAD))
    elif LATE in found:
        log.warning(
            "the checkpoint of step %d is being written for %.3g s, it has not moved for as long as "
            "advanced.save_timeout_s (%g s): training waits for it",
            under_way.job.step,
            under_way.seconds,
            _limit_s(state),
        )
        settle(state)
    elif GOES_ON not in found:
        settle(state)


def _end_without_writer(state: TrainState, under_way: BackgroundSave, rank: int) -> None:
    """Raise on all ranks, because the thread of one has died: those of the others wait for it. Collective over the
    world."""
    mesh, step = state.mesh, under_way.job.step
    state.saves.under_way = None  # nobody waits for those threads
    words = f"the thread that saves step {step} has died on rank {mesh.rank} ({mesh.place}): {under_way.death}"
    told = words_of(mesh.world, rank, words, mesh.device)
    under_way.result() if mesh.world.rank == rank else None  # raises what ended it
    raise RuntimeError(told)


def settle(state: TrainState) -> None:
    """Wait for the save that is under way, if there is one, and take note of what became of it. Collective over the
    world; raises as `checkpoint` does. A save that does not move any more ends the run."""
    under_way = state.saves.under_way
    if under_way is None:
        return
    step = under_way.job.step
    with state.trackers.doing(f"saving step {step} ..."), state.mesh.progress.during("save"):
        late_s, looked = 0.0, time.monotonic()
        while not under_way.wait(LOOK_S):
            now = time.monotonic()
            passed_s, looked = min(now - looked, 2 * LOOK_S), now  # a process that was stopped has not waited
            late_s = late_s + passed_s if under_way.still_s > _limit_s(state) else 0.0
            if late_s > GRACE_S:
                _end_hanging(state, under_way)
        try:
            path = under_way.result()
        except CheckpointError as error:
            state.saves.under_way = None
            _after_failure(state, step, error, last=False)
            return
    state.saves.under_way = None
    state.saves.succeeded(step)
    state.trackers.log(state.step, {"time/save_s": under_way.seconds})
    _tell(state, step, path)


def _end_hanging(state: TrainState, under_way: BackgroundSave) -> None:
    """End the run because a save hangs: the watchdog does it, which knows how all ranks are; alone, by an error."""
    problem = Problem(
        key="advanced.save_timeout_s",
        found=_limit_s(state),
        expected=f"the save of step {under_way.job.step} to move within it; it stands still for "
        f"{under_way.still_s:.0f} s, at {under_way.at}",
        fix="see to the disk or the store of the checkpoints; a larger advanced.save_timeout_s waits longer",
    )
    state.saves.under_way = None  # nobody waits for it again
    if state.mesh.progress.call_hang is not None:
        state.mesh.progress.call_hang(str(problem))
        time.sleep(ENDED_S)  # it ends this process meanwhile, as the hang that it is, even if the save fails now
    raise CheckpointError(str(problem))


@contextmanager
def finishing_saves(state: TrainState) -> Iterator[None]:
    """Wait for the save that is under way where the body fails: its step is done, and only its bytes are on their way.
    No longer than a save may stand still, because it may wait for a rank that has failed too. An interrupt counts too:
    the same process may open the run again, while its thread would still write into the folder."""
    try:
        yield
    except BaseException as error:
        under_way = state.saves.under_way
        if under_way is not None and not under_way.is_over:
            log.warning(
                "%s: %s; the checkpoint of step %d is written to its end before the run stops",
                type(error).__name__,
                (str(error).splitlines() or [""])[0],
                under_way.job.step,
            )
            while not under_way.wait(LOOK_S) and under_way.still_s < _limit_s(state):
                pass
        raise


def _limit_s(state: TrainState) -> float:
    own = state.config.advanced
    return own.save_timeout_s or own.timeout_s


def _say_that_it_waits(state: TrainState, before: int) -> None:
    """Warn, the first time, that a save waits for the one before: if saves take longer than the steps between them,
    every one waits."""
    level = logging.DEBUG if state.saves.has_waited else logging.WARNING
    state.saves.has_waited = True
    text = (
        "the checkpoint of step %d waits for that of step %d, which is still being written; a larger checkpoint.every "
        "lets training go on"
    )
    log.log(level, text, state.step, before)


def _tell(state: TrainState, step: int, path: Place) -> None:
    """Tell who asked for it of a checkpoint that is in place."""
    state.trackers.checkpoint(step, path)
    for callback in state.on_checkpoint:
        callback(state, path)


def _job(
    state: TrainState, folder: Place, to_host: Callable[[str, str, torch.Tensor], torch.Tensor] = in_new_memory
) -> SaveJob:
    """The save of the step that is done. Its shards are gathered as they are asked for, and their tensors brought into
    CPU memory by `to_host`. Collective over the world."""
    check_copies(state.run, state.step)  # what has drifted apart is never saved
    config, best, saves = state.config.model_dump(mode="json"), state.best, state.saves
    saved = {"tokens": state.tokens, "skipped": state.skipped, "config": config, "best": best and best.saved()}
    saved |= state.spikes.saved()
    if state.config.train.exact is not None:
        saved["device"] = state.mesh.device.type
    keeping = None
    if folder == state.folder:
        keep, frozen = state.config.checkpoint.keep, best and replace(best)
        keeping = Keeping(state.folder, keep, saves.step, frozen, saves.verified)
    return SaveJob(
        folder=folder,
        step=state.step,
        state=with_facts(saved, state.step, state.run.engine, state.mesh),
        author=saves.author,
        shards=shards_of(state.run.engine, state.run.params, state.mesh, to_host=to_host),
        keeping=keeping,
    )


def _after_failure(state: TrainState, step: int, error: CheckpointError, last: bool) -> Place | None:
    """Say that the save of a step has failed, and decide whether training goes on. Returns where the last one was made
    instead."""
    saves = state.saves
    keys = state.config.checkpoint
    saves.failed(state.step, keys.every)
    many = saves.failures >= keys.max_failures
    told = f"the checkpoint of step {step} could not be saved ({saves.failures} in a row): {error}"
    if not (last or many):
        log.warning("%s Training goes on; the next attempt is after step %d", told, saves.next_try)
        return None
    where = "none is set"
    if keys.fallback_folder is not None:
        folder = place_of(keys.fallback_folder)
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


def move_it(state: TrainState, path: Place) -> str:
    """The place of the newest checkpoint, if it is not in the run's folder, and what to do with it."""
    return f"its checkpoint is in {path}: move it to {checkpoints_folder(state.folder)}"


def _note_elsewhere(state: TrainState) -> None:
    """Note in the run's folder that the run has a checkpoint, so that it never begins at step 0 in silence. A failure
    is only said: the disk of that folder may be full. Collective over the world."""
    noted = SharedFailure(state.mesh)
    if state.mesh.rank == 0:
        with noted.attempt(f"cannot note in {state.folder} that the run has a checkpoint"):
            mark_saved(state.folder)
    if why := noted.words():
        log.warning("%s", why)


def save_elsewhere(state: TrainState, folder: Place) -> Place:
    """Save in another folder, which is made if needed, under the run's id: other runs may save there too, the same step
    at the same time. Collective over the world; raises CheckpointError on all ranks."""
    made, mesh = SharedFailure(state.mesh), state.mesh
    own = folder / (words_of(mesh.world, 0, state.saves.author.run, mesh.device) or NAMELESS)
    if mesh.rank == 0:
        with made.attempt(f"cannot make {own}"):
            for path in reversed([own, *own.parents]) if isinstance(own, Path) else ():
                if not path.exists():
                    make_folder(path)
    made.raise_on_all()
    return _job(state, own).run(mesh)
