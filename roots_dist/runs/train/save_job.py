"""Tasks of a save besides writing: compare with what the disk gives back, mark the best, delete what is not kept.

    SaveJob --write_checkpoint--> step_N --damage_of--> run.json, best.json --prune--> the newest few
    BackgroundSave: the same on a second thread of each rank, from copies in host memory, while the main threads train

A job sends only to its mesh's world, which in the background is a group of its own (world/mesh.py): the ranks agree on
failures and on the commit there, as they do otherwise, and no message of the two threads can be taken for another.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roots_dist.errors import CheckpointError, EnvironmentProblem
from roots_dist.runs.train.best_evaluation import BestEvaluation
from roots_dist.storage.checkpoint.format import Author
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.run_identity import mark_saved
from roots_dist.storage.checkpoint.save import ShardFile, write_checkpoint
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.storage.checkpoint.verified import damage_of, prune, set_all_aside
from roots_dist.world.mesh import Mesh
from roots_dist.world.progress import SAVING

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeping:
    """Rules for the run's other checkpoints when a new one is in place."""

    run: Path
    """The run's folder."""
    keep: int
    """Number of the newest checkpoints that are kept."""
    before: int
    """Step of the checkpoint before this one."""
    best: BestEvaluation | None
    """Best evaluation when the checkpoint was begun: nobody changes it any more."""
    verified: set[int]
    """Steps of which this process knows that their hashes are right. The job adds to it."""


@dataclass(frozen=True)
class SaveJob:
    """A checkpoint that is to be written, and nothing that training may change meanwhile."""

    folder: Place
    """The run's folder, or checkpoint.fallback_folder."""
    step: int
    state: dict[str, Any]
    """Result of storage.checkpoint.save.with_facts."""
    author: Author
    shards: Iterable[ShardFile]
    """This rank's; copies, if training goes on."""
    keeping: Keeping | None = None
    """None in a folder that is not the run's."""

    def run(self, mesh: Mesh) -> Place:
        """Save, compare what was in memory with what the disk gives back, and return the checkpoint's folder. Raises
        CheckpointError on all ranks. Collective over the world of `mesh`."""
        path = write_checkpoint(self.folder, self.step, self.shards, self.state, mesh, self.author)
        try:
            why = damage_of(path, self.step, self.author.run, mesh)
        except EnvironmentProblem as error:  # whether it is sound is not known: it keeps its name, and is not counted
            raise CheckpointError(str(error)) from error
        if why:
            aside = SharedFailure(mesh)
            if mesh.rank == 0:
                with aside.attempt(f"cannot rename {path}"):
                    set_all_aside([(path, why)])
            raise CheckpointError(aside.words() or why)
        if self.keeping is not None:
            self.keeping.verified.add(self.step)
            self._keep(self.keeping, mesh)
        return path

    def _keep(self, keeping: Keeping, mesh: Mesh) -> None:
        """Mark the best checkpoint, then delete older ones. If there was a better evaluation since the one before,
        whose save has failed, this one takes its place. A failure is only said: the new checkpoint is in place."""
        tidied, best = SharedFailure(mesh), keeping.best
        if mesh.rank == 0:
            with tidied.attempt(f"cannot note in {keeping.run} that it has a checkpoint"):
                mark_saved(keeping.run)
        if mesh.rank == 0 and best and best.step and (best.step == self.step or best.step > keeping.before):
            with tidied.attempt(f"cannot mark the best checkpoint of {keeping.run}"):
                best.mark(keeping.run, self.step)
            if best.step < self.step:
                why = "the best evaluation, after step %d, has no checkpoint: that of step %d is marked in its place"
                log.warning(why, best.step, self.step)
        why = tidied.words()
        if not why:
            with tidied.attempt(f"cannot delete the oldest checkpoints of {keeping.run}"):
                prune(keeping.run, keeping.keep, mesh, keeping.verified, best.step if best else None)
            why = tidied.words()
        if why:
            log.warning("%s", why)


class BackgroundSave:
    """A job that a second thread of each rank does. All ranks make it together; `mesh` is from Mesh.for_background."""

    def __init__(self, job: SaveJob, mesh: Mesh):
        self.job = job
        self._mesh, self._began, self._seconds = mesh, time.perf_counter(), 0.0
        self._path: Place | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"{SAVING} {job.step}", daemon=True)
        mesh.progress.move()
        self._thread.start()

    def _work(self) -> None:
        try:
            self._path = self.job.run(self._mesh)
        except BaseException as error:  # raised again by the main thread, whatever it is
            self._error = error
        self._seconds = time.perf_counter() - self._began

    @property
    def is_over(self) -> bool:
        """True if this rank's thread has ended, in whichever way."""
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """Seconds that it has taken, until now or until its end."""
        return self._seconds or time.perf_counter() - self._began

    @property
    def still_s(self) -> float:
        """Seconds for which this rank's thread has written and read nothing, and met no other rank's."""
        return 0.0 if self.is_over else time.monotonic() - self._mesh.progress.moved

    @property
    def at(self) -> str:
        """File, line and function where this rank's thread stands."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}" if frame else "its end"

    @property
    def death(self) -> str:
        """The way in which this rank's thread has ended, if no other rank's thread knows of it; else empty."""
        if not self.is_over or self._path is not None or isinstance(self._error, CheckpointError):
            return ""
        return f"{type(self._error).__name__}: {self._error}" if self._error is not None else "without a word"

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for this rank's thread, but no longer than that. Returns whether it has ended."""
        self._thread.join(seconds)  # .wait() would be taken for a wait for other ranks by the watchdog
        return self.is_over

    def result(self) -> Place:
        """Folder of the checkpoint. Waits for it. Raises CheckpointError on all ranks if it could not be saved, and on
        this one alone what ended its thread otherwise."""
        self.wait()
        if self._error is not None:
            raise self._error
        if self._path is None:
            raise RuntimeError(f"the thread that saves step {self.job.step} has ended without a word")
        return self._path
