"""Signs that a run's folder has had a life before: then training does not begin at step 0 in silence.

folder --signs_of_life--> "metrics.jsonl up to step 40", … ; begin_anew --renames them--> checkpoints.1, …
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from roots_dist.errors import CheckpointError, Problem
from roots_dist.files import PARTIAL, printable
from roots_dist.runs.ranks.stop_signal import AFTER_STEP, ENDED, ENDED_BEFORE, read_end
from roots_dist.runs.track.metrics import METRICS_FILE, TEXTS_FILE, last_step
from roots_dist.runs.track.summary_file import SUMMARY_FILE
from roots_dist.runs.train.left_out import REWINDS_FILE
from roots_dist.runs.train.repeats import FAILURES_FILE
from roots_dist.storage.checkpoint.disk import names, remove, rename, sync_folder
from roots_dist.storage.checkpoint.format import CHECKPOINTS, STATE_FILE, Manifest, checkpoints_folder, read_json
from roots_dist.storage.checkpoint.keep import BEST_FILE, is_unfinished, steps_in
from roots_dist.storage.checkpoint.object_store import ObjectPath, Place, place_of
from roots_dist.storage.checkpoint.run_identity import RUN_FILE, never_saved, run_id
from roots_dist.storage.checkpoint.verified import Damages

log = logging.getLogger(__name__)

SHOWN = 3
"""Number of names of a folder that a message shows."""
OF_A_LIFE = (
    METRICS_FILE,
    TEXTS_FILE,
    SUMMARY_FILE,
    BEST_FILE,
    ENDED,
    ENDED_BEFORE,
    RUN_FILE,
    FAILURES_FILE,
    REWINDS_FILE,
)
"""Files that are renamed together with the checkpoints if a run begins anew."""


def signs_of_life(folder: Path, damages: Damages) -> list[str]:
    """Signs, in words, of steps that were done in a folder without a readable checkpoint."""
    found = _signs_in_checkpoints(checkpoints_folder(folder), damages)
    if never_saved(folder):
        return found  # it was killed before its first checkpoint: the steps of its metrics are lost already
    step = last_step(folder / METRICS_FILE)
    if step > 0:
        found.append(f"{METRICS_FILE} up to step {step}")
    for name in (ENDED, ENDED_BEFORE):
        if AFTER_STEP.match(ended := read_end(folder / name)):
            found.append(f"{name} ({printable(ended[:80])})")
    if (folder / SUMMARY_FILE).exists():
        found.append(SUMMARY_FILE)
    if (folder / BEST_FILE).exists():
        found.append(BEST_FILE)
    return found


def _signs_in_checkpoints(folder: Place, damages: Damages) -> list[str]:
    if damages:
        (first, why), *rest = damages
        others = f" and {len(rest)} more" if rest else ""
        return [f"{folder.name}/{first.name}{others} ({why.rstrip('.')})"]
    if not folder.is_dir():
        return [f"{folder.name}, which is no folder"] if folder.exists() or folder.is_symlink() else []
    found = [name for name in names(folder) if name != RUN_FILE]  # which a store has from the first start on
    there = [name for name in found if not name.endswith(PARTIAL) and not is_unfinished(folder / name)]
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    return [f"{folder.name} with {', '.join(map(printable, there[:SHOWN]))}{more}"] if there else []


def refuse_silent_zero(folder: Path, damages: Damages) -> None:
    """Raise UserError if the folder shows signs of an earlier life."""
    signs = signs_of_life(folder, damages)
    if signs:
        problem = Problem(
            key="track.folder",
            found=str(folder),
            expected=f"a readable checkpoint, because the folder holds {_list(signs)}",
            fix=f"bring {checkpoints_folder(folder)} back (a disk that is not mounted, a folder that was renamed); or "
            "begin at step 0 with checkpoint.resume=false, which renames what is there, or in another track.folder",
        )
        raise CheckpointError(str(problem))


def refuse_to_leave_behind(folder: Path, fallback: str | None, step: int) -> None:
    """Raise CheckpointError if checkpoint.fallback_folder holds a checkpoint of this run of more than `step` steps,
    those of the newest in the run's own folder (0 if it has none). Where that folder has vanished, and one of the same
    name is new, the config in the checkpoint tells that it is this run's."""
    if fallback is None:
        return
    own = run_id(folder)
    for later, path in _elsewhere(place_of(fallback), own):
        if later > step and (_run_of(path) == own if own else _began_in(path, folder)):
            here = f"step {step}" if step else "none"
            anew = "" if own else ", or begin anew with checkpoint.resume=false"
            problem = Problem(
                key="checkpoint.fallback_folder",
                found=fallback,
                expected=f"no later checkpoint of this run than its own folder has ({here}), but {path} is one",
                fix=f"move it to {checkpoints_folder(folder)}; or delete it, to do these steps again{anew}",
            )
            raise CheckpointError(str(problem))


def _elsewhere(fallback: Place, own: str) -> list[tuple[int, Place]]:
    """Steps that were saved in checkpoint.fallback_folder, newest first: by the run of an id, or if that is not known
    by any. Each run has a folder there; earlier versions saved beside these."""
    folders = [fallback, *(fallback / name for name in ([own] if own else names(fallback)))]
    found = [one for folder in folders for one in steps_in(folder / CHECKPOINTS).items()]
    return sorted(found, key=lambda one: one[0], reverse=True)


def _run_of(checkpoint: Place) -> str:
    """Id of the run that has saved a checkpoint; empty if it cannot be read."""
    try:
        return Manifest.read(checkpoint).author.run
    except CheckpointError:
        return ""


def _began_in(checkpoint: Place, folder: Path) -> bool:
    """True if the run that has saved a checkpoint had this folder."""
    try:
        was = read_json(checkpoint / STATE_FILE)["config"]["track"]["folder"]
    except (CheckpointError, KeyError, TypeError):
        return False
    return isinstance(was, str) and Path(was).absolute() == folder.absolute()


def _list(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def _refuse_to_rename(checkpoints: ObjectPath) -> None:
    if [name for name in names(checkpoints) if name != RUN_FILE]:
        problem = Problem(
            key="checkpoint.resume",
            found=False,
            expected=f"true, because nothing is renamed in an object store, and {checkpoints} holds checkpoints",
            fix="choose another checkpoint.url and another track.folder",
        )
        raise CheckpointError(str(problem))


def begin_anew(folder: Path) -> None:
    """Rename what an earlier life has left, all with one new number: checkpoints of later steps would be taken for the
    new run's newest, and its metrics would be lost."""
    checkpoints = checkpoints_folder(folder)
    if isinstance(checkpoints, ObjectPath):
        _refuse_to_rename(checkpoints)
        remove(checkpoints / RUN_FILE)  # the new run has another id
    there = [folder / name for name in OF_A_LIFE if (folder / name).exists() or (folder / name).is_symlink()]
    if isinstance(checkpoints, Path) and (
        checkpoints.is_symlink() or checkpoints.is_file() or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    ):
        there.append(checkpoints)
    elif not there:
        return
    free = (n for n in count(1) if not any((folder / f"{path.name}.{n}").exists() for path in there))
    number = next(free)
    for path in there:
        rename(path, folder / f"{path.name}.{number}")
    sync_folder(folder)
    log.info("starts from scratch; what was here ends in .%d now: %s", number, ", ".join(path.name for path in there))
