"""A rank that stops, or waits for something that never comes, in one place of a run, in one layout. The others must say
which rank it is and how, in time."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from commands import roots

from roots_dist.cli.main import main
from roots_dist.learning.data.store import Writer
from roots_dist.testing.world import ATTEMPTS

from .lateness import lateness
from .trial import Family, Outcome

TIMEOUT_S = 3
SLOW_S = 2.0
"""Seconds beyond the two after the timeout, and beyond what the machine is late, in which files appear."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2": (2, ("parallel.tp=2",)),
    "tp2 sp": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2": (2, ("parallel.pp=2",)),
    "dp2": (2, ("parallel.zero_stage=0", "advanced.engine=reference")),
    "dp2 zero1 reference": (2, ("advanced.engine=reference",)),
    "dp2 zero1": (2, ("parallel.zero_stage=1",)),
    "dp2 zero2": (2, ("parallel.zero_stage=2",)),
    "dp2 zero3": (2, ("parallel.zero_stage=3",)),
    "tp2 pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
}
PLACES: dict[str, str] = {
    "compute": "roots_dist.parallel.pipeline.executor.Executor._forward",
    "all-reduce": "torch.distributed.all_reduce",
    "pipeline receive": "roots_dist.parallel.pipeline.executor.Executor._arrived",
    "pipeline send": "roots_dist.parallel.pipeline.executor.Executor._send",
    "making a batch": "roots_dist.learning.data.batches.Batches.at",
    "optimizer": "roots_dist.runs.train.step.sum_over_ranks",
    "shard write": "roots_dist.storage.checkpoint.save.write_shard",
    "shard write, long before the next save": "roots_dist.storage.checkpoint.save.write_shard",
    "commit": "roots_dist.storage.checkpoint.save.commit",
    "evaluation": "roots_dist.runs.train.callbacks.score_held_out",
    "resume": "roots_dist.runs.train.loop.resume",
    "building the model": "roots_dist.runs.train.loop.build_run",
}
"""Place -> the function that the rank enters and does not leave."""
IN_A_SAVE: dict[str, str] = {
    "beginning": "roots_dist.storage.checkpoint.save.begin",
    "writing a shard": "roots_dist.storage.checkpoint.save.write_shard",
    "writing the manifest": "roots_dist.storage.checkpoint.save.write_metadata",
    "committing": "roots_dist.storage.checkpoint.save.commit",
    "reading back": "roots_dist.runs.train.save_job.damage_of",
    "deleting older ones": "roots_dist.runs.train.save_job.prune",
}
"""The same for the thread that saves while training goes on."""
OF_RANK_0 = ("commit", "beginning", "writing the manifest", "committing")
LONG = ("train.steps=100000", "checkpoint.every=30")
OWN_WORDS = {"shard write, long before the next save": LONG, **dict.fromkeys(IN_A_SAVE, LONG)}
"""Place -> what else its command says: here nobody waits for the thread that writes."""
ONLY_PIPELINE = ("pipeline receive", "pipeline send")


def stop_in(words: Sequence[str]) -> None:
    """`STOPPED RANK PLACE HOW WORDS...`: roots WORDS, on a rank that stops in a place, or sleeps there."""
    stamp, rank, place, how, *rest = words
    if os.environ["RANK"] != rank:
        main(rest)
        return
    module, _, name = {**PLACES, **IN_A_SAVE}[place].rpartition(".")
    owner = resolve(module)
    inside = getattr(owner, name)
    late = place in ("all-reduce", "compute", "pipeline receive", "pipeline send", "making a batch", "optimizer")
    calls = 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (7 if late else 0):
            Path(stamp).write_text(str(time.time()))
            if how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                time.sleep(1000)
        return inside(*args, **kwargs)

    with mock.patch.object(owner, name, stops):
        main(rest)


def resolve(path: str) -> Any:
    """What a dotted name leads to: a module, or a class in one."""
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        outer, _, name = path.rpartition(".")
        return getattr(resolve(outer), name)


def write_run(place: Path, timeout_s: int = TIMEOUT_S) -> Path:
    """The config of a small run, its corpus beside it."""
    for name in ("train", "validation"):
        with Writer(place / name, np.dtype("<u2")) as writer:
            writer.add(np.arange(3000, dtype=np.int64) % 61)
            writer.commit()
    config = {
        "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 61},
        "data": {"train": str(place / "train"), "validation": str(place / "validation"), "seq_length": 8},
        "train": {"steps": 20, "global_batch": 4, "device": "cpu", "eval_sequences": 4},
        "checkpoint": {"every": 3},
        "track": {"folder": str(place / "run"), "wandb": "disabled", "tensorboard": "off"},
        "advanced": {"threads": 1, "timeout_s": timeout_s, "init_timeout_s": 60},
    }
    (place / "c.yaml").write_text(yaml.safe_dump(config))
    return place / "c.yaml"


def trial(draw: random.Random, place: Path) -> Outcome:
    """One hang. It holds if the message and the record of the end name the rank, in time, and every process has
    ended."""
    return one_hang(draw, place, draw.choice(list(PLACES)), draw.choice(("stops", "sleeps")))


def in_a_save(draw: random.Random, place: Path) -> Outcome:
    return one_hang(draw, place, draw.choice(list(IN_A_SAVE)), "sleeps")


def one_hang(draw: random.Random, place: Path, where: str, how: str) -> Outcome:
    layouts = [name for name in LAYOUTS if "pp" in name or where not in ONLY_PIPELINE]
    layout = draw.choice(layouts)
    size, overrides = LAYOUTS[layout]
    rank = 0 if where in OF_RANK_0 else draw.randrange(size)
    config, stamp = write_run(place), place / "stopped"
    for _ in range(ATTEMPTS):
        with lateness() as late:
            ran = roots(
                str(stamp),
                str(rank),
                where,
                how,
                "train",
                str(config),
                *overrides,
                *OWN_WORDS.get(where, ()),
                ranks=size,
                main=stop_in,
                limit_s=1500,
            )
        if stamp.exists():
            break
    over = time.time()
    kind = f"{how} in {where}"
    if not stamp.exists():
        return Outcome(kind, held=False, words=f"{layout}: rank {rank} was never there: {ran.stderr[-300:]}")
    since = float(stamp.read_text())
    slow = SLOW_S + late.allowance(since)
    record = place / "run" / "ended.txt"
    ended = record.read_text() if record.exists() else ""
    named = record.stat().st_mtime - since if ended else 1e9
    cause = f"rank {rank} (" in ended.partition(": ")[2].partition(": ")[2]
    times = f"named after {named:.1f} s, over after {over - since:.1f} s ({slow:.1f} s slow)"
    words = f"{layout}: rank {rank} {kind}: {times}: {ended}"
    failed = ran.returncode in (1, -signal.SIGKILL)  # that of the rank that others had to kill
    held = cause and "hang in" in ended and failed and over - since < TIMEOUT_S + 5 + slow
    return Outcome(kind, held and named < TIMEOUT_S + 2 + slow, words if held else words + ran.stderr[-2600:])


FAMILY = Family(
    "hangs",
    harm="one rank stops (SIGSTOP) or sleeps for ever in one place of a run, in nine layouts",
    promise=f"it is named, with who waits for it, in {TIMEOUT_S} + 2 s, and the job is over in {TIMEOUT_S} + 5 s",
    trial=trial,
    sample=1,
)
SAVES_FAMILY = Family(
    "hung_saves",
    harm="the thread of one rank that saves while training goes on sleeps for ever in one place of the save, in nine "
    "layouts; the next save is far away, so that nobody waits for it",
    promise=f"the rank is named, with where its thread stands, in {TIMEOUT_S} + 2 s, and the job is over in "
    f"{TIMEOUT_S} + 5 s",
    trial=in_a_save,
    sample=0,
)
