"""A signal that ends a run, once or several times, to one rank or to all, in a phase of the run that is drawn. The run
ends by itself with a checkpoint, says why, and the same command goes on to the weights of a run that nobody stopped."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from commands import roots

from roots_dist.cli.main import main

from .hangs import IN_A_SAVE, LAYOUTS, PLACES, resolve
from .ranks import LIMIT_S, STEPS, digest_of, judge, newest_step, untouched, words_of
from .trial import Family, Outcome

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
BEFORE = ("building the model", "resume")
WHERE: dict[str, tuple[str, int]] = {
    **{place: (PLACES[place], 1) for place in BEFORE},
    "making a batch": (PLACES["making a batch"], STEPS - 1),
    "computing": (PLACES["compute"], STEPS - 1),
    "a message": (PLACES["all-reduce"], 4 * STEPS),
    "the optimizer": (PLACES["optimizer"], STEPS - 1),
    "an evaluation": (PLACES["evaluation"], 3),
    "the copy of a save": ("roots_dist.runs.train.saving._job", STEPS - 1),
    **{f"a save, {place}": (IN_A_SAVE[place], STEPS - 1) for place in IN_A_SAVE},
    "the last save": ("roots_dist.runs.train.loop.save_last", 1),
}
"""Phase -> the function that the rank enters, and of how many calls one is drawn."""
EVALUATES = ("train.eval_every=3", "train.eval_sequences=4")
HEARD_S = 60.0
"""Seconds for which a rank waits in its place for the signal."""


def signalled_in(words: Sequence[str]) -> None:
    """`STAMP RANK WHERE CALL WORDS...`: roots WORDS, on a rank that waits in a place until a signal has been sent."""
    for number in SIGNALS:  # a shell lets what it starts in the background ignore some
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    stamp, rank, where, call, *rest = words
    if os.environ.get("RANK", "0") != rank:
        main(rest)
        return
    module, _, name = WHERE[where][0].rpartition(".")
    owner = resolve(module)
    inside, calls = getattr(owner, name), 0

    def waits(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(call):
            Path(stamp).touch()
            until = time.monotonic() + HEARD_S
            while not Path(f"{stamp}.sent").exists() and time.monotonic() < until:
                time.sleep(0.01)
        return inside(*args, **kwargs)

    with mock.patch.object(owner, name, waits):
        main(rest)


def trial(draw: random.Random, place: Path) -> Outcome:
    layout, where = draw.choice(list(LAYOUTS)), draw.choice(list(WHERE))
    number, size = draw.choice(SIGNALS), LAYOUTS[layout][0]
    victim, call = draw.randrange(size), draw.randint(1, WHERE[where][1])
    if where in ("a save, beginning", "a save, writing the manifest", "a save, committing"):
        victim = 0  # the others have no part in it
    times = 1 if number == signal.SIGINT else draw.randint(1, 3)  # a second Ctrl-C ends a run at once
    to_all = where in BEFORE or draw.random() < 0.5
    stamp, run = place / "there", place / "run"

    def send(pids: Sequence[int]) -> None:
        until = time.monotonic() + LIMIT_S
        while not stamp.exists() and time.monotonic() < until and not (run / "ended.txt").exists():
            time.sleep(0.01)
        if stamp.exists():
            for _ in range(times):
                for pid in pids if to_all else [pids[victim]]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(0.02)
        Path(f"{stamp}.sent").touch()

    words = (*words_of(layout, place), f"data.validation={place / 'validation'}", *EVALUATES)
    ran = roots(
        str(stamp),
        str(victim),
        where,
        str(call),
        *words,
        ranks=size,
        main=signalled_in,
        meanwhile=send,
        limit_s=LIMIT_S,
    )
    kind = f"{number.name} in {where}"
    ended = (run / "ended.txt").read_text() if (run / "ended.txt").exists() else ""
    seen = f"{layout}, {times} to {'all' if to_all else f'rank {victim}'}, call {call}: code {ran.returncode}, {ended}"
    is_over = ended.startswith(f"finished after step {STEPS}")
    stopped = re.match(rf"stopped by {number.name} (?:before training|after step (\d+))", ended)
    if not (is_over and ran.returncode == 0) and not (stopped and ran.returncode == 128 + number):
        return Outcome(kind, held=False, words=f"{seen} {ran.stderr[-600:]}")
    if is_over:
        return Outcome(
            f"{kind}: the run was over" if not stamp.exists() else kind, digest_of(run) == untouched(layout), seen
        )
    step = int(stopped[1] or 0) if stopped else 0
    if newest_step(run) != step or "Traceback" in ran.stderr:
        return Outcome(kind, held=False, words=f"{seen}: {newest_step(run)} is the newest step {ran.stderr[-600:]}")
    again = roots(*words, ranks=size, limit_s=LIMIT_S)
    if again.returncode:
        return Outcome(kind, held=False, words=f"{seen}, again: {again.stderr[-600:]}")
    wrong = judge(run, step, again.stdout + again.stderr, layout)
    return Outcome(kind, not wrong, f"{seen}: {wrong}")


FAMILY = Family(
    "signals",
    harm="one rank, or all, of a run of two or four get SIGTERM, SIGHUP, SIGUSR1 (up to three times) or Ctrl-C in a "
    "phase that is drawn, in nine layouts and engines",
    promise="the run ends with 128 + the signal, says after which step, and has its checkpoint (before the first step "
    "there is none); the same command goes on to the weights and moments, to the bit, of a run that nobody stopped",
    trial=trial,
    sample=0,
)
