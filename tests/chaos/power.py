"""Loss of power, in a model of a disk that keeps nothing that was not synced.

Saves are run once, alone or in the background of a run that trains, and every call by which they change the disk is
written down. Then each moment between two of them is
replayed: names whose folder was not synced since, and content of files that were not, may be there or not, in any
combination. A checkpoint that had been committed must be found, whole, in each.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from roots_dist.runs.train.loop import TrainParts, train
from roots_dist.storage.checkpoint.keep import remove_leftovers
from roots_dist.storage.checkpoint.verified import newest_verified, prune
from roots_dist.world.mesh import Mesh

from .background import config_of
from .small_run import save_step, small_run
from .trial import Family, Outcome

Call = tuple[str, tuple[Any, ...]]
STATES = 96
"""States that a trial looks at: a moment, and what of the unsynced is there."""


@dataclass
class Node:
    """A file or a folder of the model."""

    content: bytes | None = None
    """None: a folder."""
    synced: bytes = b""
    """Content that is on disk."""
    names: dict[str, Node] = field(default_factory=dict)
    on_disk: dict[str, Node] = field(default_factory=dict)
    """Names that are on disk."""
    pending: list[dict[str, Node | None]] = field(default_factory=list)
    """Changes of names since the folder was synced, in order; None removes one. A rename is one change of two names."""


def folder_of(root: Node, parts: tuple[str, ...]) -> Node:
    for part in parts:
        root = root.names[part]
    return root


def play(root: Node, call: Call) -> None:
    """Do one call in the model."""
    name, (path, *more) = call
    parent, last = folder_of(root, path[:-1]), path[-1] if path else ""

    def change(names: dict[str, Node | None]) -> None:
        parent.pending.append(names)
        for key, node in names.items():
            if node is None:
                del parent.names[key]
            else:
                parent.names[key] = node

    if name == "mkdir":
        change({last: Node()})
    elif name == "create":
        change({last: Node(b"")})
    elif name == "write":
        node = parent.names[last]
        node.content = (node.content or b"") + more[0]
    elif name == "content":
        parent.names[last].content = more[0]
    elif name == "sync":
        node = folder_of(root, path)
        if node.content is None:
            node.on_disk, node.pending = dict(node.names), []
        else:
            node.synced = node.content
    elif name == "rename":
        assert more[0][:-1] == path[:-1], "a rename from one folder to another"
        change({last: None, more[0][-1]: parent.names[last]})
    elif name == "remove":
        change({last: None})


def after_the_loss(node: Node, place: Path, keeps: Callable[[], bool]) -> None:
    """Write what is on disk when the power comes back. `keeps` says of each unsynced thing whether it is there. Names
    of one folder change in their order, as a journal does it: a later change is there only if those before are."""
    names, kept = dict(node.on_disk), True
    for change in node.pending:
        kept = kept and keeps()
        for key, child in change.items() if kept else ():
            if child is None:
                names.pop(key, None)
            else:
                names[key] = child
    for key, child in names.items():
        if child.content is None:
            (place / key).mkdir()
            after_the_loss(child, place / key, keeps)
        else:
            lost = child.content if keeps() else child.synced
            (place / key).write_bytes(lost)


@contextmanager
def written_down(run: Path) -> Iterator[list[Call]]:
    """Note the calls by which the body changes the folder."""
    calls: list[Call] = []
    open_files: dict[int, tuple[str, ...]] = {}
    real = {name: getattr(os, name) for name in ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink")}
    real["rmdir"] = os.rmdir

    def parts(path: Any) -> tuple[str, ...] | None:
        path = Path(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else None
        return path.relative_to(run).parts if path and path.is_relative_to(run) else None

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        real["mkdir"](path, *args, **kwargs)
        if where := parts(path):
            calls.append(("mkdir", (where,)))

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        new = not os.path.lexists(path)
        fd: int = real["open"](path, flags, *args, **kwargs)
        where = parts(path)
        if where is not None:
            open_files[fd] = where
            if flags & os.O_CREAT and new:
                calls.append(("create", (where,)))
        else:
            open_files.pop(fd, None)
        return fd

    def write(fd: int, block: Any) -> int:
        done: int = real["write"](fd, block)
        if fd in open_files:
            calls.append(("write", (open_files[fd], bytes(block[:done]))))
        return done

    def fsync(fd: int) -> None:
        real["fsync"](fd)
        if fd in open_files:
            if (path := run.joinpath(*open_files[fd])).is_file():  # what Python's own files have written
                calls.append(("content", (open_files[fd], path.read_bytes())))
            calls.append(("sync", (open_files[fd],)))

    def renamed(name: str) -> Callable[..., None]:
        def rename(old: Any, new: Any) -> None:
            real[name](old, new)
            if (where := parts(old)) and (to := parts(new)):
                calls.append(("rename", (where, to)))

        return rename

    def remove(name: str) -> Callable[..., None]:
        def removed(path: Any, *args: Any, **kwargs: Any) -> None:
            real[name](path, *args, **kwargs)
            if where := parts(path):
                calls.append(("remove", (where,)))

        return removed

    with pytest.MonkeyPatch.context() as patch:
        for name, function in {
            "mkdir": mkdir, "open": open_, "write": write, "fsync": fsync,
            "rename": renamed("rename"), "replace": renamed("replace"),
            "unlink": remove("unlink"), "rmdir": remove("rmdir"),
        }.items():  # fmt: skip
            patch.setattr(os, name, function)
        yield calls


Log = tuple[list[Call], list[tuple[int, int]]]
"""The calls of some saves, and after how many of them each step was committed."""


def saves_alone(run_folder: Path, steps: Sequence[int], keep: int) -> Log:
    """Save steps one after the other, and prune."""
    run, committed, verified = small_run(), [], set[int]()
    with written_down(run_folder) as calls:
        for step in steps:
            save_step(run, run_folder, step)
            committed.append((len(calls), step))
            prune(run_folder, keep, Mesh.single(), verified)
    return calls, committed


def saves_of_a_run(run_folder: Path, keep: int) -> Log:
    """Train, and save every other step in the background. A step is committed when the run has been told so."""
    committed = []
    config = config_of(run_folder.parent, 1).changed({"checkpoint.keep": keep})
    with written_down(run_folder) as calls:

        def tell(_: Any, path: Path) -> None:
            committed.append((len(calls), int(path.name[-8:])))

        assert train(config, Mesh.single(), TrainParts(on_checkpoint=(tell,))) == 0
    return calls, committed


def trial(draw: random.Random, place: Path) -> Outcome:
    """Save some steps, and look at states of moments that are drawn."""
    run_folder, disk = place / "run", place / "disk"
    run_folder.mkdir()
    keep, again, trains = draw.choice([1, 2]), draw.random() < 0.3, draw.random() < 0.5
    if trains:
        kind, (calls, committed) = "saves in the background of a run", saves_of_a_run(run_folder, keep)
    else:
        kind = "saves, the last step saved twice" if again else "saves of new steps"
        calls, committed = saves_alone(run_folder, (1, 2, 3, 3) if again else (1, 2, 3), keep)
    moments = sorted(draw.choices(range(len(calls) + 1), k=STATES))
    root, done, looked = Node(), 0, 0
    for moment in moments:
        for call in calls[done:moment]:
            play(root, call)
        done = moment
        share = draw.choice([0.0, 0.0, 1.0, draw.random()])
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        after_the_loss(root, disk, lambda share=share: draw.random() < share)
        looked += 1
        if told := broken(disk, [step for at, step in committed if at <= moment]):
            return Outcome(kind, held=False, words=f"call {moment} of {len(calls)}: {told}", count=looked)
    return Outcome(kind, held=True, count=looked)


def broken(disk: Path, committed: list[int]) -> str:
    """What is wrong with a disk, in words: the newest committed step, or a newer one, must be found and whole."""
    if (disk / "checkpoints").is_dir():
        remove_leftovers(disk / "checkpoints")
    found, damages = newest_verified(disk, Mesh.single())
    step = int(found.name[-8:]) if found else 0
    if damages:
        return f"{damages[0][0].name} looks like a checkpoint: {damages[0][1]}"
    return "" if step >= max(committed, default=0) else f"step {step} is found, {max(committed)} was committed"


FAMILY = Family(
    "power",
    harm="the power goes between two calls to the disk of a save or a deletion, alone or in the background of a run, "
    "and of what was not synced any part is lost (a model of the disk)",
    promise="every step whose save had returned, or was told, is found, whole, and nothing torn looks like one",
    trial=trial,
    sample=2,
)
