"""Find the folders of a run that look like checkpoints. Those that cannot be read are set aside, never
deleted. No torch; on one rank at a time.

A name proves nothing, nor does this file: verified.py compares the hashes, in all ranks together.
"""

from __future__ import annotations

import contextlib
import logging
import re
from itertools import count
from pathlib import Path

from roots_dist.errors import CheckpointError
from roots_dist.files import PARTIAL, write_atomically
from roots_dist.storage.checkpoint.disk import is_there, names, remove, rename, size_of, sync_folder, write_file
from roots_dist.storage.checkpoint.format import (
    STATE_FILE,
    Manifest,
    checkpoints_folder,
    digest,
    read_json,
    step_name,
)
from roots_dist.storage.checkpoint.object_store import MANIFEST, UNFINISHED, ObjectPath, Place

log = logging.getLogger(__name__)

REPLACED = ".replaced"
"""Suffix of a complete checkpoint that is set aside while a new one of the same step takes its name."""
BEST_FILE = "best.json"
"""File in the run's folder that names the best checkpoint and its metric."""
GONE = ".gone"
"""Suffix of a checkpoint that is being deleted."""
DAMAGED = ".damaged"
"""Suffix of a checkpoint that could not be read; a text file beside it says why."""
NAME = re.compile(rf"step_([0-9]{{8,18}})|\.step_([0-9]{{8,18}}){re.escape(REPLACED)}")


def found_steps(run: Place) -> dict[int, Place]:
    """Everything with the name of a checkpoint of the run, by step, oldest first: a folder, or something else in its
    place."""
    return steps_in(checkpoints_folder(run))


def steps_in(folder: Place) -> dict[int, Place]:
    """Everything with the name of a checkpoint in a folder of them, as `found_steps`."""
    found: dict[int, Place] = {}
    for name in names(folder):
        match = NAME.fullmatch(name)
        if match and step_name(step := int(match[1] or match[2])) in name and not is_unfinished(folder / name):
            found[step] = folder / name
    return dict(sorted(found.items()))


def is_unfinished(checkpoint: Place) -> bool:
    """True if this is a save into an object store that was not committed; there a checkpoint has its name from the
    beginning."""
    if not isinstance(checkpoint, ObjectPath):
        return False
    return (checkpoint / UNFINISHED).exists() and not (checkpoint / MANIFEST).exists()


def check_complete(folder: Place, step: int, run_id: str = "") -> Manifest:
    """Raise CheckpointError unless the folder contains the files of its manifest, of this step and of this run; no id
    is any run's. Compares sizes, not hashes."""
    manifest = Manifest.read(folder)
    if manifest.step != step:
        raise CheckpointError(f"{folder}: step = {manifest.step} in its manifest: expected {step}. Fix: rename it.")
    if run_id and manifest.author.run not in ("", run_id):
        raise CheckpointError(
            f"{folder}: run = {manifest.author.run} in its manifest: expected {run_id}, the run of this folder. "
            "Fix: put it back into the folder of its own run."
        )
    for name in manifest.files:
        manifest.check_size(folder, name)
    check_state(folder, manifest)
    return manifest


def check_state(folder: Place, manifest: Manifest) -> None:
    """Raise CheckpointError if state.json is not a trainer's state of the manifest's step and config."""
    path = folder / STATE_FILE
    state = read_json(path)
    if state.get("step") != manifest.step:
        raise CheckpointError(
            f"{path}: step = {state.get('step')!r}: expected {manifest.step} as in the manifest. "
            "Fix: use another checkpoint."
        )
    if manifest.config and digest(state.get("config")) != manifest.config:
        raise CheckpointError(f"{path}: config differs from the manifest's digest. Fix: use another checkpoint.")
    taken = state.get("taken", {})
    odd = {
        "taken": not isinstance(taken, dict)
        or not all(key.isascii() and key.isdecimal() and _is_count(steps) for key, steps in taken.items()),
        "skipped": not _is_count(state.get("skipped", 0)),
        "config": not isinstance(state.get("config", {}), dict)
        or not all(isinstance(section, dict) for section in state.get("config", {}).values()),
        "best": not _is_best(state.get("best")),
        "losses": not _are_numbers(state.get("losses", [])),
        "norms": not _are_numbers(state.get("norms", [])),
        "spikes_in_a_row": not _is_count(state.get("spikes_in_a_row", 0)),
        "left_out": not are_pairs(state.get("left_out", [])),
    }
    for key in (key for key, is_odd in odd.items() if is_odd):
        found = str(state.get(key))
        raise CheckpointError(f"{path}: {key} = {found[:80]}: is no trainer's state. Fix: use another checkpoint.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(number, float) for number in value)


def are_pairs(value: object) -> bool:
    """True if this is a list of pairs of counts, as runs/train/left_out.py saves it."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in value
    )


def _is_best(value: object) -> bool:
    """True if this is what runs/train/best_evaluation.py saves, or nothing."""
    if not value:
        return value in (None, {})
    return (
        isinstance(value, dict)
        and value.keys() == {"metric", "patience", "step", "value", "waited"}
        and isinstance(value["metric"], str)
        and all(_is_count(value[name]) for name in ("patience", "step", "waited"))
        and isinstance(value["value"], (int, float, type(None)))
    )


def best_step(run: Path) -> int | None:
    """Step of the checkpoint with the best held-out metric, if the run has recorded one (fine-tuning). A file that is
    damaged says none, with a warning: the checkpoints are sound all the same."""
    marked = Path(run) / BEST_FILE
    try:
        step = read_json(marked).get("step") if size_of(marked) is not None else None
    except CheckpointError as error:
        log.warning("which checkpoint is the best is not known: %s", str(error).partition(" Fix: ")[0])
        return None
    return step if isinstance(step, int) else None


def set_damaged_aside(path: Place, why: str) -> Place:
    """Rename what has a checkpoint's name and is none, so that nothing takes or overwrites it. Returns its new name;
    a text file of that name says why."""
    name = f"{path.name.strip('.').removesuffix(REPLACED)}{DAMAGED}"
    tries = (path.with_name(name if number == 1 else f"{name}.{number}") for number in count(1))
    aside = next(new for new in tries if not is_there(new))
    rename(path, aside)
    with contextlib.suppress(OSError):  # a full disk; the log says it too
        text = aside.with_name(f"{aside.name}.txt")
        if isinstance(text, Path):
            write_atomically(text, f"{why}\n")
        else:
            write_file(text, [f"{why}\n".encode()])
    sync_folder(path.parent)
    return aside


def remove_leftovers(folder: Place) -> None:
    """Remove what killed saves and deletions left in a checkpoints folder. Called before a new save, on rank 0."""
    for path in [folder / name for name in names(folder)]:
        if isinstance(path, ObjectPath) and path.name.startswith("step_") and (path / UNFINISHED).exists():
            remove(path / UNFINISHED if (path / MANIFEST).exists() else path)
    for path in [folder / name for name in names(folder) if name.startswith(".step_")]:
        if path.name.endswith((PARTIAL, GONE)):
            try:
                remove(path)
            except OSError as error:  # a file that another node still has open, or of another owner
                log.warning("%s cannot be removed (%s): nothing needs it", path, error)
        elif path.name.endswith(REPLACED):
            final = folder / path.name[1 : -len(REPLACED)]
            is_part = isinstance(path, ObjectPath) and not (path / MANIFEST).exists()  # the manifest is copied last
            is_whole = is_there(final / MANIFEST if isinstance(final, ObjectPath) else final)
            if is_whole or is_part:
                remove(path)
            else:
                if is_there(final):
                    remove(final)  # killed while it was removed, after it had been copied
                rename(path, final)  # killed between the two renames: the old one is still valid
                sync_folder(folder)
