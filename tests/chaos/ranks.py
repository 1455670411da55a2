"""kill -9 of one rank, of several at once or of all, at a moment that is drawn, in every layout and engine. The same
command then goes on from the last committed step, and ends with the weights of a run that nobody touched."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from commands import roots

from roots_dist.storage.checkpoint.keep import found_steps

from .hangs import LAYOUTS, write_run
from .trial import Family, Outcome

STEPS = 8
OVERRIDES = (
    f"train.steps={STEPS}",
    "checkpoint.every=1",
    "checkpoint.keep=3",
    "model.dropout=0.1",
    "data.validation=[]",
    "train.eval_sequences=64",
)
LIMIT_S = 1500.0
"""For one run, on a machine that may be very busy: what hangs is found by the run itself."""


def words_of(layout: str, place: Path) -> tuple[str, ...]:
    """The command of a run in this layout."""
    return ("train", str(write_run(place, timeout_s=300)), *OVERRIDES, *LAYOUTS[layout][1])


@cache
def untouched(layout: str) -> str:
    """Digest of the last weights and moments of a run that nobody touches."""
    with tempfile.TemporaryDirectory() as place:
        ran = roots(*words_of(layout, Path(place)), ranks=LAYOUTS[layout][0], limit_s=LIMIT_S)
        assert ran.returncode == 0, ran.stderr
        return digest_of(Path(place) / "run")


def digest_of(run: Path) -> str:
    """Digest of the run's newest checkpoint, but for what tells of its attempt."""
    newest = list(found_steps(run).values())[-1]
    files = sorted(newest.glob("*.safetensors"))
    return f"{newest.name} {hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()}"


def newest_step(run: Path) -> int:
    return max(found_steps(run), default=0)


def wait_for_step(run: Path, step: int, until: float) -> None:
    """Return when this step is committed, or when it is too late."""
    while newest_step(run) < step and time.monotonic() < until:
        time.sleep(0.01)


def judge(run: Path, committed: int, resumed: str, layout: str) -> str:
    """What is wrong with a run that was killed and has ended since, in words. `resumed`: what it said."""
    after = [line for line in resumed.splitlines() if "resumed after step " in line]
    step = int(after[0].partition("resumed after step ")[2].split()[0]) if after else 0
    if step < committed:
        return f"resumed after step {step}, {committed} was committed: {resumed[-400:]}"
    if digest_of(run) != untouched(layout):
        return "its last checkpoint is not that of an untouched run"
    left = [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step_")]
    return f"left: {left}" if left else ""


def trial(draw: random.Random, place: Path) -> Outcome:
    layout = draw.choice(list(LAYOUTS))
    size = LAYOUTS[layout][0]
    victims = draw.sample(range(size), draw.randint(1, size))
    step, delay = draw.randrange(0, STEPS - 2), draw.random() * 0.2
    run, committed = place / "run", [0]

    def kill(pids: Sequence[int]) -> None:
        wait_for_step(run, step, time.monotonic() + LIMIT_S)
        time.sleep(delay)
        committed[0] = newest_step(run)
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(pids[victim], signal.SIGKILL)

    words = words_of(layout, place)
    killed = roots(*words, ranks=size, meanwhile=kill, limit_s=LIMIT_S)
    who = "all ranks" if len(victims) == size else f"{len(victims)} of {size} ranks"
    kind = f"{layout}: {who}"
    if killed.returncode == 0:
        return Outcome("too late: the run was over", held=digest_of(run) == untouched(layout))
    again = roots(*words, ranks=size, limit_s=LIMIT_S)
    if again.returncode:
        return Outcome(kind, held=False, words=f"after {victims} at {committed[0]}: {again.stderr[-500:]}")
    wrong = judge(run, committed[0], again.stdout + again.stderr, layout)
    return Outcome(kind, not wrong, f"{victims} at step {committed[0]}: {wrong}", count=len(victims))


FAMILY = Family(
    "ranks",
    harm="a run of two or four ranks, in nine layouts and engines, saves at every step; one rank, several at once or "
    "all of them get SIGKILL at a random moment, and the same command is given again",
    promise="no committed step is lost, nothing is left of the save that was cut off, and the last weights and moments "
    "are to the bit those of a run that nobody touched",
    trial=trial,
    sample=0,
)
