"""The checkpoint format: file names, the plan of which rank writes what, the manifest. No torch, no processes.

    <run>/checkpoints/step_00000100/
        model-00001-of-00004.safetensors …       master weights, unsharded, under their global names
        exp_avg-….safetensors, exp_avg_sq-…      Adam's moments, under the same names
        model.safetensors.index.json …           name -> file, as in Hugging Face; one for each of the three
        state.json                               step, and the rest of the trainer's state
        manifest.json                            run, attempt, step, digests, size and sha256 of every other file;
                                                 written last

The layout that saved it is only recorded as a word in state.json. save.py writes it, load.py and keep.py read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roots_dist.config.store_url import why_no_store
from roots_dist.errors import CheckpointError, Problem
from roots_dist.files import reason, write_atomically
from roots_dist.storage.checkpoint.disk import FileFacts, hash_file, read, size_of, sync_folder, write_file
from roots_dist.storage.checkpoint.object_store import MANIFEST, Place, place_of

FORMAT = 2
WITHOUT_AUTHOR = 1
"""Format of manifests before they told run, attempt, config and order of samples."""
STEMS = {"weight": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Tensors of the optimizer state (zero.seam.STATE) -> prefix of their file names."""
STATE_FILE, CHECKPOINTS = "state.json", "checkpoints"
URL_FILE = "checkpoints.url"
"""File in a run's folder that says in which object store its checkpoints are, where they are not beside it."""
URL_FIX = "put back what the run has written, its checkpoint.url, or remove the file if its checkpoints are beside it"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def checkpoints_folder(run: Place) -> Place:
    """The place of a run's checkpoints: a folder in the run's folder, or the URL that this names. Raises as `url_of`
    does."""
    if isinstance(run, Path) and (url := url_of(run)):
        return place_of(url)
    return run / CHECKPOINTS


def url_of(run: Path) -> str:
    """The object store where the checkpoints of the run in this folder are; empty if they are beside it. Raises
    CheckpointError if the file says anything but the URL of an object store: the folder may be somebody else's."""
    path = run / URL_FILE
    try:
        url = read(path).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error, path)}). Fix: {URL_FIX}.") from error
    if why := why_no_store(url):
        raise CheckpointError(
            str(Problem(key=str(path), found=url[:80], expected=f"the URL of an object store ({why})", fix=URL_FIX))
        )
    return url


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def keep_at(run: Path, url: str | None) -> None:
    """Note in a run's folder, which is made if needed, that its checkpoints are in an object store (None: beside it).
    Raises CheckpointError if they are somewhere else already. Every rank calls it, rank 0 first: the folder need not be
    shared."""
    was, here = url_of(run), run / CHECKPOINTS
    if (url or "") == was:
        return
    if was or (here.is_dir() and any(here.iterdir())):
        fix = f"set checkpoint.url={was or 'null'}, or begin another run in another track.folder"
        raise CheckpointError(
            str(Problem(key="checkpoint.url", found=url, expected=f"{was or here}, where the run's are", fix=fix))
        )
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / URL_FILE, f"{url}\n")
    sync_folder(run)


def shard_name(kind: str, number: int, total: int) -> str:
    """File name of a shard. Numbers start at 1, as in Hugging Face."""
    return f"{STEMS[kind]}-{number:05d}-of-{total:05d}.safetensors"


def index_name(kind: str) -> str:
    return f"{STEMS[kind]}.safetensors.index.json"


@dataclass(frozen=True)
class ShardPlan:
    """The rank that writes each parameter of a pipeline stage, and the shard that contains it."""

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
class Author:
    """The author of a checkpoint: the run that wrote it, and from which samples."""

    run: str = ""
    """Id of the run (run_identity.py); empty outside of one: of an import, and of a proof."""
    attempt: int = 0
    """Number of the start of the run's command that wrote it; the first is 1."""
    order: str = ""
    """Digest of what the order of training samples depends on (learning/data/batches.py)."""
    start: str = ""
    """Random word of that start, which no copy of the run's folder has (store_owner.py)."""


@dataclass(frozen=True)
class Manifest:
    """The files that the folder must contain. A folder without a valid manifest is not a checkpoint."""

    step: int
    files: dict[str, FileFacts]
    author: Author = Author()
    config: str = ""
    """Digest of the config in state.json."""

    def write(self, folder: Place) -> None:
        files = {name: asdict(facts) for name, facts in sorted(self.files.items())}
        facts = {"format": FORMAT, "step": self.step, **asdict(self.author), "config": self.config}
        write_json(folder / MANIFEST, {**facts, "files": files})

    @staticmethod
    def read(folder: Place) -> Manifest:
        path = folder / MANIFEST
        value = read_json(path)
        if value.get("format") not in (FORMAT, WITHOUT_AUTHOR):
            raise CheckpointError(
                f"{path}: format = {value.get('format')!r}: expected {FORMAT}. Fix: read it with the version of "
                "roots_dist that wrote it."
            )
        try:
            files = {name: FileFacts(_whole(f["bytes"]), _text(f["sha256"])) for name, f in value["files"].items()}
            step = _whole(value["step"])
            author, config = Author(), ""
            if value["format"] == FORMAT:
                author = Author(_text(value["run"]), _whole(value["attempt"]), _text(value["order"]))
                config = _text(value["config"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: is damaged ({error!r}). Fix: use another checkpoint.") from error
        strange = [name for name in files if not PLAIN_NAME.fullmatch(name)]
        if strange:
            raise CheckpointError(f"{path}: file {strange[0]!r}: expected a plain file name. Fix: do not trust it.")
        unlisted = {STATE_FILE, *map(index_name, STEMS)} - files.keys()
        if unlisted:
            raise CheckpointError(f"{path}: {min(unlisted)} is not listed. Fix: use another checkpoint.")
        return Manifest(step, files, author, config)

    def check_size(self, folder: Place, name: str) -> None:
        path = folder / name
        size = size_of(path)
        if size is None:
            raise CheckpointError(f"{path}: is missing. Fix: use another checkpoint.")
        if size != self.files[name].bytes:
            raise CheckpointError(
                f"{path}: size = {size}: expected {self.files[name].bytes} bytes. "
                "Fix: it was cut short; use another checkpoint."
            )

    def check_hash(self, folder: Place, name: str) -> None:
        if hash_file(folder / name) != self.files[name]:
            raise CheckpointError(
                f"{folder / name}: sha256 differs from the manifest's. Fix: it is damaged; use another."
            )


def _whole(value: object) -> int:
    """A whole number that is none below zero and fits 63 bits. Raises TypeError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r} is not a number of steps or bytes")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def digest(value: object) -> str:
    """sha256 of a value, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Place, value: object) -> FileFacts:
    """Write JSON and wait until it is on disk. Returns size and hash of what was in memory."""
    return write_file(path, [(json.dumps(value, indent=1, allow_nan=False) + "\n").encode()])


def read_json(path: Place) -> dict[str, Any]:
    try:
        value = json.loads(read(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing. Fix: give the folder of a checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error, str(path))
        raise CheckpointError(f"{path}: cannot be read ({why}). Fix: use another checkpoint.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(value).__name__}. Fix: use another.")
    return value


def read_index(folder: Place, kind: str) -> dict[str, str]:
    """Parameter name -> file."""
    path = folder / index_name(kind)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(f, str) and PLAIN_NAME.fullmatch(f) for f in weight_map.values()
    ):
        raise CheckpointError(f"{path}: weight_map is damaged. Fix: use another checkpoint.")
    return weight_map
