"""The id of a run, how often its command was started, and whether it has ever saved: run.json in its folder, written
before the first checkpoint.

A checkpoint tells the first two, so that one of another run is not taken for this run's. A run that was killed before
its first checkpoint has none to lose: its next start may begin at step 0.
"""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from roots_dist.errors import CheckpointError
from roots_dist.files import write_atomically
from roots_dist.storage.checkpoint.disk import sync_folder
from roots_dist.storage.checkpoint.format import Author, Manifest, read_json
from roots_dist.storage.checkpoint.keep import found_steps
from roots_dist.storage.checkpoint.object_store import Place

RUN_FILE = "run.json"
ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
"""Form of an id: it is a name in checkpoint.fallback_folder."""
MOST_STARTS = 1 << 62
"""No run is started as often: a manifest holds numbers of 63 bits."""
SAVED = "saved"
"""Key of whether the run has ever committed a checkpoint."""


def run_id(run: Path) -> str:
    """Id of the run in this folder: of its run.json, or else of its newest checkpoint that tells one; empty if neither
    does."""
    return id_in(Path(run) / RUN_FILE) or id_of_newest(run)


def id_in(path: Place) -> str:
    """Id in a run.json; empty if the run has been moved without it, if it is damaged, or none that can be a name."""
    try:
        return as_id(read_json(path).get("id"))
    except CheckpointError:
        return ""


def as_id(found: object) -> str:
    """The value that was read, if it can be an id; else empty."""
    return found if isinstance(found, str) and ID.fullmatch(found) else ""


def id_of_newest(run: Path) -> str:
    """Id of the run that has saved the newest checkpoint that tells one; empty if none does."""
    for path in reversed(found_steps(run).values()):
        try:
            if found := as_id(Manifest.read(path).author.run):
                return found
        except CheckpointError:
            continue
    return ""


def begin_attempt(run: Path, order: str, wanted: str | None = None) -> Author:
    """Count one more start of the run in this folder, which gets an id if it has none: `wanted` (checkpoint.run_id), or
    a random one. Rank 0 calls it when it holds the folder."""
    path = Path(run) / RUN_FILE
    try:
        attempt = read_json(path).get("attempt")
    except CheckpointError:
        attempt = None
    number = attempt + 1 if isinstance(attempt, int) and 0 < attempt < MOST_STARTS else 1
    author = Author(run_id(run) or wanted or secrets.token_hex(8), number, order, secrets.token_hex(8))
    _write(path, {"id": author.run, "attempt": author.attempt, SAVED: bool(found_steps(run))})
    return author


def mark_saved(run: Path) -> None:
    """Note that the run in this folder has a checkpoint. Rank 0 calls it after each commit."""
    path = Path(run) / RUN_FILE
    try:
        found = read_json(path)
    except CheckpointError:
        return  # without the file nothing is known, and signs of a life count
    if found.get(SAVED) is not True:
        _write(path, found | {SAVED: True})


def never_saved(run: Path) -> bool:
    """True if the run in this folder is known to have had no checkpoint yet."""
    try:
        return read_json(Path(run) / RUN_FILE).get(SAVED) is False
    except CheckpointError:
        return False


def _write(path: Path, content: dict[str, object]) -> None:
    write_atomically(path, json.dumps(content) + "\n")
    sync_folder(path.parent)
