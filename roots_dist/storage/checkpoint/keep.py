"""Which folders of a run are checkpoints, which is the newest, and which may go. On one rank at a time; no torch.

A name proves nothing: a folder counts when its manifest can be read and every file is there with its size.
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
"""A save that has not been committed."""
REPLACED = ".replaced"
"""A whole checkpoint, set aside while a new one of the same step takes its name."""
BEST_FILE = "best.json"
"""In the run's folder: which checkpoint did best, and by what."""
GONE = ".gone"
"""A checkpoint that is being deleted."""
NAME = re.compile(rf"step_(\d{{8,}})|\.step_(\d{{8,}}){re.escape(REPLACED)}")


def complete(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first. What looks like one and is not is left out, with a warning."""
    found: dict[int, Path] = {}
    folder = checkpoints_folder(run)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():  # names that begin with a dot come first
        match = NAME.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        step = int(match[1] or match[2])
        try:
            check_whole(path, step)
        except CheckpointError as error:
            log.warning("not a checkpoint, left out: %s", error)
        else:
            found[step] = path
    return [found[step] for step in sorted(found)]


def check_whole(folder: Path, step: int) -> None:
    """Raise CheckpointError unless the folder holds what its manifest lists. Looks at sizes, not at hashes."""
    manifest = Manifest.read(folder)
    if manifest.step != step:
        raise CheckpointError(f"{folder}: step = {manifest.step} in its manifest: expected {step}. Fix: rename it.")
    for name in manifest.files:
        manifest.check_size(folder, name)


def newest(run: Path) -> Path | None:
    found = complete(run)
    return found[-1] if found else None


def best(run: Path) -> Path | None:
    """The checkpoint that did best on held-out data, where the run has kept one (fine-tuning)."""
    marked = Path(run) / BEST_FILE
    step = read_json(marked).get("step") if marked.is_file() else None
    return next((path for path in complete(run) if Manifest.read(path).step == step), None)


def chosen(run: Path) -> Path:
    """What those who read a run's model take: its best checkpoint, or else its newest. Raises CheckpointError if none
    is there."""
    found = best(run) or newest(run)
    if found is None:
        raise CheckpointError(f"{run} holds no complete checkpoint. Fix: train it first, or name another run's folder.")
    return found


def prune(run: Path, keep: int) -> None:
    """Delete all but the best and the newest `keep` checkpoints. Foreign and torn folders are not touched."""
    assert keep >= 1, keep
    kept = best(run)
    for path in (path for path in complete(run)[:-keep] if path != kept):
        gone = path.with_name(f".{path.name.strip('.')}{GONE}")
        os.rename(path, gone)  # first the name: a kill between two files leaves nothing that looks like a checkpoint
        shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Remove what killed saves and deletions left behind in a checkpoints folder. Before a new save, on rank 0."""
    for path in folder.glob(".step_*"):
        if path.name.endswith((PARTIAL, GONE)):
            shutil.rmtree(path)
        elif path.name.endswith(REPLACED):
            final = folder / path.name[1 : -len(REPLACED)]
            if final.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, final)  # killed between the two renames: the old one is still the one that counts
