"""Samples that a run which went back to a checkpoint does not read again: rewinds.json in its folder, and
in later checkpoints.

    {"left_out": [[20, 48]]}    from the 21st step on, samples are those 48 further on

It is written before the checkpoint is loaded, so that a run that is killed meanwhile goes on as it would have. A number
of samples from a step on says the same in every layout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from roots_dist.errors import CheckpointError
from roots_dist.files import write_atomically
from roots_dist.runs.train.spikes import LeftOut
from roots_dist.storage.checkpoint.disk import is_there, sync_folder
from roots_dist.storage.checkpoint.format import read_json
from roots_dist.storage.checkpoint.keep import are_pairs
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.world.mesh import Mesh

REWINDS_FILE = "rewinds.json"


def read_left_out(folder: Path, in_checkpoint: Sequence[Sequence[int]], mesh: Mesh) -> tuple[LeftOut, ...]:
    """Samples that the run has left out: those in its checkpoint, and those that its folder names beyond them. The
    folder's list counts only if it begins as the checkpoint's does, and so is of the same history. Collective over the
    world; equal on every rank.

    Raises CheckpointError on all ranks if the file is damaged, for samples would be read twice in silence.
    """
    read, found = SharedFailure(mesh), tuple((step, samples) for step, samples in in_checkpoint)
    if mesh.rank == 0 and is_there(folder / REWINDS_FILE):
        with read.attempt(f"cannot read {folder / REWINDS_FILE}"):
            ours = _read(folder / REWINDS_FILE)
            found = ours if ours[: len(found)] == found else found
    read.raise_on_all()
    if mesh.world.size == 1:
        return found
    size = torch.tensor(len(found), device=mesh.device)
    dist.broadcast(size, src=mesh.world.ranks[0], group=mesh.world.group)
    numbers = torch.zeros(int(size), 2, dtype=torch.int64, device=mesh.device)
    if mesh.rank == 0:
        numbers = torch.tensor(found, dtype=torch.int64, device=mesh.device).view(-1, 2)
    dist.broadcast(numbers, src=mesh.world.ranks[0], group=mesh.world.group)
    return tuple((int(step), int(samples)) for step, samples in numbers.tolist())


def write_left_out(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Write it, and wait until it is on disk. Rank 0 calls it; raises OSError."""
    write_atomically(folder / REWINDS_FILE, json.dumps({"left_out": left_out}) + "\n")
    sync_folder(folder)


def forget_left_out(folder: Path) -> None:
    """Remove what an earlier life in this folder has left out, because this one begins at step 0. Rank 0 calls it;
    raises OSError."""
    (folder / REWINDS_FILE).unlink(missing_ok=True)


def _read(path: Path) -> tuple[LeftOut, ...]:
    found: Any = read_json(path).get("left_out")
    if not are_pairs(found):
        raise CheckpointError(f"{path}: is damaged. Fix: remove it, and samples are read again that had been left out.")
    return tuple((step, samples) for step, samples in found)
