"""kill -9 of a process that trains and saves at every step, at a moment that is drawn."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from roots_dist.runs.train.resume import resume
from roots_dist.storage.checkpoint.verified import prune
from roots_dist.world.mesh import Mesh

from .small_run import save_step, small_run, step_of_weights
from .trial import Family, Outcome

LIVES = 4


def _live(place: Path, told: int) -> None:
    """Resume, then save step after step, and say each that is committed in a byte stream, until killed."""
    run = small_run()
    step = resume(run, place / "run").step
    assert step == 0 or step == step_of_weights(run)
    verified = {step}
    while True:
        step += 1
        save_step(run, place / "run", step)
        os.write(told, step.to_bytes(4, "little"))
        verified.add(step)
        prune(place / "run", 2, Mesh.single(), verified)


def trial(draw: random.Random, place: Path) -> Outcome:
    """Four lives of one run. After each kill it must resume from the last step that was told, or a newer one, with the
    weights of that step."""
    (place / "run").mkdir()
    newest = 0
    for life in range(LIVES):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(ours)
                _live(place, theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        first = os.read(ours, 4)  # it lives
        if not first:
            return Outcome("a life that did not begin", held=False, words=f"life {life} after step {newest}")
        time.sleep(draw.random() * 0.12)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        told = first
        while more := os.read(ours, 4096):
            told += more
        os.close(ours)
        newest = int.from_bytes(told[-4:], "little")
        if not os.WIFSIGNALED(status):
            return Outcome("a kill", held=False, words=f"life {life} ended by itself after step {newest}")
        again = small_run()
        step = resume(again, place / "run").step
        if step < newest or step != step_of_weights(again):
            return Outcome("a kill", held=False, words=f"resumed after step {step}, {newest} was committed")
    return Outcome("a kill at a random moment of a run that saves", held=True, count=LIVES)


FAMILY = Family(
    "kills",
    harm="a run that saves at every step gets SIGKILL at a random moment, and is resumed, four times",
    promise="no committed step is lost, the weights are those of the step, and the run goes on",
    trial=trial,
    sample=1,
)
