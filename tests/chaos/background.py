"""kill -9 in every phase of a save that is written while training goes on: before a call to the disk that is drawn, in
the thread that writes."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.data.store import Writer
from roots_dist.runs.train.loop import TrainParts, train
from roots_dist.storage.checkpoint import format
from roots_dist.storage.checkpoint.format import checkpoints_folder, step_name
from roots_dist.world.mesh import Mesh

from .trial import Family, Outcome

STEPS, EVERY = 8, 2
CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")
PHASES = {
    "mkdir": "begins", "open": "opens a file", "write": "writes", "fsync": "syncs", "rename": "commits or deletes",
    "replace": "notes its end", "unlink": "removes", "rmdir": "removes", "hash_file": "reads back",
}  # fmt: skip
MOST = {1: 354, 2: 249}
"""About how many calls a rank's thread makes in a run, by the number of ranks."""


def config_of(place: Path, ranks: int) -> Config:
    """A run with dropout, in one process or in two tensor ranks."""
    text = place / "text"
    if not (place / "text.bin").exists():
        with Writer(text, np.dtype("<u2")) as writer:
            writer.add(np.random.default_rng(0).integers(0, 29, 1000).astype("<u2"))
            writer.commit()
    tree = {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 29, "dropout": 0.1},
        "data": {"train": str(text), "seq_length": 8},
        "parallel": {"tp": ranks},
        "train": {"steps": STEPS, "global_batch": 2, "micro_batch": 2, "device": "cpu"},
        "checkpoint": {"every": EVERY},
        "track": {"folder": str(place / "run"), "wandb": "disabled", "tensorboard": "off"},
    }
    return Config.model_validate(tree)


def forked(work: Callable[[], None]) -> int:
    """Do something in a process of its own. Returns its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def life(place: Path, ranks: int, victim: int = 0, fatal: int = 0, told: int | None = None) -> int:
    """Train to the end, in one process for each rank, all of which end with the first that does not end well. Before
    its call to the disk of number `fatal` (0: none) the writing thread of the rank `victim` kills its process. Steps
    whose commit is known are written to `told` by rank 0. Returns how the first process ended that did not end well;
    0 if none did."""
    config, store = config_of(place, ranks), tempfile.mktemp(dir=place)

    def rank_of(rank: int) -> None:
        if ranks > 1:
            dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
        if fatal and rank == victim:
            kill_before(place, fatal)

        def tell(_: Any, path: Path) -> None:
            if told is not None and rank == 0:
                os.write(told, int(path.name[-8:]).to_bytes(4, "little"))

        train(config, Mesh.connect(Layout(tp=ranks), rank), TrainParts(on_checkpoint=(tell,)))

    pids = {forked(functools.partial(rank_of, rank)) for rank in range(ranks)}
    first = 0
    while pids:
        for pid in list(pids):
            found, status = os.waitpid(pid, os.WNOHANG)
            pids -= {found}
            if status and not first:
                first = status
                for other in pids:  # as a launcher does
                    os.kill(other, signal.SIGKILL)
        time.sleep(0.002)
    return first


def kill_before(place: Path, number: int) -> None:
    """End this process by SIGKILL before a call of its writing thread, and say which call it was."""
    seen = 0

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if threading.current_thread().name.startswith("save of step"):
                seen += 1
                if seen == number:
                    (place / "phase").write_text(name)
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    format.hash_file = watched("hash_file", format.hash_file)


def hashes(run: Path, step: int) -> dict[str, str]:
    """Hashes of the tensors of a checkpoint, by file."""
    manifest = checkpoints_folder(run) / step_name(step) / "manifest.json"
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}


@functools.cache
def undisturbed(ranks: int) -> dict[str, str]:
    """Hashes of the last checkpoint of a run that nobody kills."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        assert life(Path(folder), ranks) == 0
        return hashes(Path(folder) / "run", STEPS)


def trial(draw: random.Random, place: Path) -> Outcome:
    """Kill a run in a save, and let it go on to its end: no commit that was told is lost, and its last checkpoint is
    that of a run that nobody has killed, to the bit."""
    ranks = draw.choice([1, 1, 2])
    victim, fatal = draw.randrange(ranks), draw.randrange(1, MOST[ranks])
    expected = undisturbed(ranks)
    ours, theirs = os.pipe()
    status = life(place, ranks, victim, fatal, theirs)
    os.close(theirs)
    told = os.read(ours, 4096)
    os.close(ours)
    newest = max((int.from_bytes(told[i : i + 4], "little") for i in range(0, len(told), 4)), default=0)
    if status and not (os.WIFSIGNALED(status) and (place / "phase").exists()):
        return Outcome("a run that failed by itself", held=False, words=f"status {status}")
    phase = PHASES[(place / "phase").read_text(encoding="utf-8")] if status else "has ended"
    kind = f"{'one process' if ranks == 1 else 'one of two tensor ranks'}, the save {phase}"
    left = [int(path.name[-8:]) for path in (place / "run" / "checkpoints").glob("step_*")]
    if max(left, default=0) < newest:
        return Outcome(kind, held=False, words=f"steps {left} are there, {newest} was told")
    if status and (again := life(place, ranks)):
        return Outcome(kind, held=False, words=f"the next start ended with status {again}")
    litter = [path.name for path in (place / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    same = hashes(place / "run", STEPS) == expected
    return Outcome(kind, same and not litter, "" if same else f"other weights at the end; {litter}")


FAMILY = Family(
    "background",
    harm="a run in one process or two gets SIGKILL at a call to the disk that is drawn, in the thread that writes a "
    "checkpoint while training goes on, and is started again",
    promise="no commit that was told is lost, nothing is left over, and the last checkpoint is that of a run that "
    "was not killed, to the bit",
    trial=trial,
    sample=2,
)
