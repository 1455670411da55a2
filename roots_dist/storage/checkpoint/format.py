"""The checkpoint format: file names, the plan of which rank writes what, hashes, the manifest. No torch, no processes.

    <run>/checkpoints/step_00000100/
        model-00001-of-00004.safetensors …       master weights, unsharded, under their global names
        exp_avg-….safetensors, exp_avg_sq-…      Adam's moments, under the same names
        model.safetensors.index.json …           name -> file, as in Hugging Face; one for each of the three
        state.json                               step, and the rest of the trainer's state
        manifest.json                            size and sha256 of every other file; written last

The layout that saved it is only recorded as a word in state.json. save.py writes it, load.py and keep.py read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roots_dist.errors import CheckpointError
from roots_dist.files import reason

FORMAT = 1
STEMS = {"weight": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Tensors of the optimizer state (zero.seam.STATE) -> prefix of their file names."""
MANIFEST, STATE_FILE = "manifest.json", "state.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def checkpoints_folder(run: Path) -> Path:
    return Path(run) / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def shard_name(kind: str, number: int, total: int) -> str:
    """File name of a shard. Numbers start at 1, as in Hugging Face."""
    return f"{STEMS[kind]}-{number:05d}-of-{total:05d}.safetensors"


def index_name(kind: str) -> str:
    return f"{STEMS[kind]}.safetensors.index.json"


@dataclass(frozen=True)
class ShardPlan:
    """For each parameter of a pipeline stage, the rank that writes it and the shard that contains it."""

    owner: tuple[int, ...]
    shard: tuple[int, ...]
    num_shards: int


def plan_shards(sizes: Sequence[int], owners: int, limit: int) -> ShardPlan:
    """Distribute parameters of these sizes (bytes) evenly over ranks, then fill each rank's shards up to `limit` in the
    order of the parameters. Every rank of the stage computes the same plan.

    Longest first to the least loaded rank (Graham 1969): at most 4/3 of the optimum. A parameter above the limit gets a
    shard of its own.
    """
    load, owner = [0] * owners, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += sizes[i]
    shard, count = [0] * len(sizes), 0
    for who in range(owners):
        filled = 0
        for i in (i for i in range(len(sizes)) if owner[i] == who):
            if filled == 0 or filled + sizes[i] > limit:
                count, filled = count + 1, 0
            shard[i], filled = count - 1, filled + sizes[i]
    return ShardPlan(tuple(owner), tuple(shard), count)


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files that the folder must contain. A folder without a valid manifest is not a checkpoint."""

    step: int
    files: dict[str, FileFacts]

    def write(self, folder: Path) -> None:
        files = {name: asdict(facts) for name, facts in sorted(self.files.items())}
        write_json(folder / MANIFEST, {"format": FORMAT, "step": self.step, "files": files})

    @staticmethod
    def read(folder: Path) -> Manifest:
        path = Path(folder) / MANIFEST
        value = read_json(path)
        if value.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format = {value.get('format')!r}: expected {FORMAT}. Fix: read it with the version of "
                "roots_dist that wrote it."
            )
        try:
            files = {name: FileFacts(int(f["bytes"]), str(f["sha256"])) for name, f in value["files"].items()}
            step = int(value["step"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: is damaged ({error!r}). Fix: use another checkpoint.") from error
        strange = [name for name in files if not PLAIN_NAME.fullmatch(name)]
        if strange:
            raise CheckpointError(f"{path}: file {strange[0]!r}: expected a plain file name. Fix: do not trust it.")
        unlisted = {STATE_FILE, *map(index_name, STEMS)} - files.keys()
        if unlisted:
            raise CheckpointError(f"{path}: {min(unlisted)} is not listed. Fix: use another checkpoint.")
        return Manifest(step, files)

    def check_size(self, folder: Path, name: str) -> None:
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing. Fix: use another checkpoint.")
        if path.stat().st_size != self.files[name].bytes:
            raise CheckpointError(
                f"{path}: size = {path.stat().st_size}: expected {self.files[name].bytes} bytes. "
                "Fix: it was cut short; use another checkpoint."
            )

    def check_hash(self, folder: Path, name: str) -> None:
        if file_facts(Path(folder) / name) != self.files[name]:
            raise CheckpointError(
                f"{Path(folder) / name}: sha256 differs from the manifest's. Fix: it is damaged; use another."
            )


def file_facts(path: Path) -> FileFacts:
    """Size and hash of a file."""
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
            size += len(block)
    return FileFacts(size, sha.hexdigest())


def write_json(path: Path, value: object) -> None:
    """Write JSON and wait until it is on disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing. Fix: give the folder of a checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error, path)
        raise CheckpointError(f"{path}: cannot be read ({why}). Fix: use another checkpoint.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(value).__name__}. Fix: use another.")
    return value


def read_index(folder: Path, kind: str) -> dict[str, str]:
    """Parameter name -> file."""
    path = Path(folder) / index_name(kind)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(f, str) and PLAIN_NAME.fullmatch(f) for f in weight_map.values()
    ):
        raise CheckpointError(f"{path}: weight_map is damaged. Fix: use another checkpoint.")
    return weight_map


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
