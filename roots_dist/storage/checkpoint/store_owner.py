"""The run whose checkpoints an object store holds, and the start of it that saves there: run.json beside them.

    a start --refuse_another_runs--> claim: its id, and a word of its own --each save: refuse_if_taken--> save
                                                                          --another start came since--> CheckpointError

A store has no lock. So the start that came last is the one that saves: an earlier one, which goes on behind a broken
network, or in a copy of the run's folder, fails with its next save, and cannot replace or delete what is not its own.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from roots_dist.errors import CheckpointError, EnvironmentProblem, Problem
from roots_dist.storage.checkpoint.disk import write_file
from roots_dist.storage.checkpoint.format import Author, checkpoints_folder, read_json
from roots_dist.storage.checkpoint.object_store import ObjectPath
from roots_dist.storage.checkpoint.run_identity import RUN_FILE, as_id, id_in, id_of_newest


def claim(run: Path, author: Author) -> None:
    """Note in the object store where the checkpoints of the run in this folder are, if they are in one, that this start
    saves there from now on. Rank 0 calls it. Raises EnvironmentProblem."""
    place = checkpoints_folder(run)
    if not isinstance(place, ObjectPath):
        return
    mark = {"id": author.run, "attempt": author.attempt, "start": author.start}
    mark |= {"host": socket.gethostname(), "folder": os.path.abspath(run)}
    try:
        write_file(place / RUN_FILE, [json.dumps(mark).encode()])
    except OSError as error:
        raise EnvironmentProblem(
            f"{place / RUN_FILE} = cannot be written ({error}): expected a place that only this run saves to. "
            "Fix: see to the store and the keys, and repeat the command."
        ) from error


def refuse_if_taken(place: ObjectPath, author: Author) -> None:
    """Raise CheckpointError if another start has claimed the place since this one did."""
    mark = _mark(place)
    if author.start and mark.get("start") not in (None, author.start):
        problem = Problem(
            key="checkpoint.url",
            found=str(place),
            expected=f"a place where no other run saves: another has begun there since, {_who(mark)}",
            fix="stop one of them; a copy of a run's folder needs a checkpoint.url and a run of its own: remove its "
            f"{RUN_FILE} and checkpoints.url",
        )
        raise CheckpointError(str(problem))


def refuse_another_runs(run: Path, wanted: str | None = None, *, trains: bool = False) -> None:
    """Raise CheckpointError if the checkpoints of the run in this folder are in an object store, and there they are
    another run's. `wanted`: checkpoint.run_id. A folder that knows no run may read any, but only with `wanted` go on
    with it where it `trains`. Rank 0 calls it."""
    place, own = checkpoints_folder(run), id_in(run / RUN_FILE)
    if wanted and own and wanted != own:
        problem = Problem(
            key="checkpoint.run_id",
            found=wanted,
            expected=f"{own}, the run that is in {run}",
            fix="leave it out, or choose another track.folder",
        )
        raise CheckpointError(str(problem))
    if not isinstance(place, ObjectPath):
        return
    mark, mine = _mark(place), own or wanted or ""
    owner = as_id(mark.get("id")) or id_of_newest(run)
    if owner and owner != mine and (mine or trains):
        problem = Problem(
            key="checkpoint.url",
            found=str(place),
            expected=f"a place of this run alone: its checkpoints are of run {owner}{', ' if mark else ''}{_who(mark)}",
            fix="choose another checkpoint.url"
            + (
                ""
                if own
                else f"; or go on with that run, which nobody else may train any more: checkpoint.run_id={owner}"
            ),
        )
        raise CheckpointError(str(problem))


def _mark(place: ObjectPath) -> dict[str, Any]:
    """run.json in a store; nothing if there is none, or a damaged one."""
    try:
        return read_json(place / RUN_FILE)
    except CheckpointError:
        return {}


def _who(mark: dict[str, Any]) -> str:
    known = {name: str(mark.get(name, ""))[:200] for name in ("folder", "host", "attempt")}
    return f"start {known['attempt']} of {known['folder']} on node {known['host']}" if mark else ""
