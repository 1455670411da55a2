"""Which folders of a run are checkpoints, which is the newest, and which are deleted. Runs on one rank at a time; no
torch.

The name proves nothing: a folder is a checkpoint if its manifest is valid and every file exists with its size.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from roots_dist.errors import CheckpointError
from roots_dist.storage.checkpoint.format import Manifest, checkpoints_folder, read_json

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Suffix of a save that has not been committed."""
REPLACED = ".replaced"
"""Suffix of a complete checkpoint that is set aside while a new one of the same step takes its name."""
BEST_FILE = "best.json"
"""File in the run's folder that names the best checkpoint and its metric."""
GONE = ".gone"
"""Suffix of a checkpoint that is being deleted."""
NAME = re.compile(rf"step_(\d{{8,}})|\.step_(\d{{8,}}){re.escape(REPLACED)}")


def complete(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first. A folder that only looks like one is skipped with a warning."""
    found: dict[int, Path] = {}
    folder = checkpoints_folder(run)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():  # names that begin with a dot come first
        match = NAME.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        step = int(match[1] or match[2])
        try:
            check_complete(path, step)
        except CheckpointError as error:
            log.warning("skipping an incomplete checkpoint: %s", error)
        else:
            found[step] = path
    return [found[step] for step in sorted(found)]


def check_complete(folder: Path, step: int) -> None:
    """Raise CheckpointError unless the folder contains the files of its manifest. Compares sizes, not hashes."""
    manifest = Manifest.read(folder)
    if manifest.step != step:
        raise CheckpointError(f"{folder}: step = {manifest.step} in its manifest: expected {step}. Fix: rename it.")
    for name in manifest.files:
        manifest.check_size(folder, name)


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(run)
    return found[-1] if found else None


def best(run: Path) -> Path | None:
    """The checkpoint with the best held-out metric, if the run has recorded one (fine-tuning)."""
    marked = Path(run) / BEST_FILE
    step = read_json(marked).get("step") if marked.is_file() else None
    return next((path for path in complete(run) if Manifest.read(path).step == step), None)


def best_or_newest(run: Path) -> Path:
    """The checkpoint to read a run's model from: the best one, or else the newest. Raises CheckpointError if there is
    none."""
    found = best(run) or newest(run)
    if found is None:
        raise CheckpointError(f"{run} holds no complete checkpoint. Fix: train it first, or name another run's folder.")
    return found


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the best and the newest `keep`. Other folders and incomplete checkpoints are not
    touched."""
    assert keep >= 1, keep
    kept = best(run)
    for path in (path for path in complete(run)[:-keep] if path != kept):
        gone = path.with_name(f".{path.name.strip('.')}{GONE}")
        os.rename(path, gone)  # rename first, so that a kill in between leaves nothing that looks complete
        shutil.rmtree(gone)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves and deletions left in a checkpoints folder. Called before a new save, on rank 0."""
    for path in folder.glob(".step_*"):
        if path.name.endswith((PARTIAL, GONE)):
            shutil.rmtree(path)
        elif path.name.endswith(REPLACED):
            final = folder / path.name[1 : -len(REPLACED)]
            if final.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, final)  # killed between the two renames: the old one is still valid
