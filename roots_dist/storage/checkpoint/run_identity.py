"""The id of a run, and how often its command was started: run.json in its folder, written before the first checkpoint.

A checkpoint tells both, so that one of another run is not taken for this run's.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from roots_dist.errors import CheckpointError
from roots_dist.files import write_atomically
from roots_dist.storage.checkpoint.disk import sync_folder
from roots_dist.storage.checkpoint.format import Author, Manifest, read_json
from roots_dist.storage.checkpoint.keep import found_steps

RUN_FILE = "run.json"


def run_id(run: Path) -> str:
    """Id of the run in this folder: of its run.json, or else of its newest checkpoint that tells one; empty if neither
    does."""
    try:
        found = read_json(Path(run) / RUN_FILE).get("id")
        if isinstance(found, str) and found:
            return found
    except CheckpointError:
        pass  # of a run that has been moved without it, or a damaged one
    for path in reversed(found_steps(run).values()):
        try:
            if manifest := Manifest.read(path).author.run:
                return manifest
        except CheckpointError:
            continue
    return ""


def begin_attempt(run: Path, order: str) -> Author:
    """Count one more start of the run in this folder, which gets an id if it has none. Rank 0 calls it when it holds
    the folder."""
    path = Path(run) / RUN_FILE
    try:
        attempt = read_json(path).get("attempt")
    except CheckpointError:
        attempt = None
    author = Author(
        run_id(run) or secrets.token_hex(8), attempt + 1 if isinstance(attempt, int) and attempt > 0 else 1, order
    )
    write_atomically(path, json.dumps({"id": author.run, "attempt": author.attempt}) + "\n")
    sync_folder(path.parent)
    return author
