"""Calls to the kernel that fail in a whole run, by strace: what a disk refuses, refuses everywhere, in every thread."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

from commands import environ, roots

from .hangs import write_run
from .ranks import OVERRIDES, newest_step
from .trial import Family, Outcome

CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
ERRORS = ("EIO", "ENOSPC", "EROFS", "EDQUOT")
ALONE = "tp2"
"""What is drawn are faults; the run is one process."""


def trial(draw: random.Random, place: Path) -> Outcome:
    call, error = draw.choice(CALLS), draw.choice(ERRORS)
    first, which = draw.randrange(1, 60), draw.choice(("", "+", "+3"))
    kind = f"{call}: {error}"
    config = write_run(place, timeout_s=60)
    words = ("train", str(config), *OVERRIDES, f"checkpoint.fallback_folder={place / 'elsewhere'}")
    tracer = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={call}"]
    inject = ["-e", f"inject={call}:error={error}:when={first}{which}"]
    variables = environ() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [*tracer, *inject, sys.executable, "-m", "roots_dist", *words],
        env=variables, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    run = place / "run"
    said = f"{first}{which}, exit code {ran.returncode}: {(ran.stdout + ran.stderr)[-500:]}"
    if "Traceback" in ran.stderr or ran.returncode not in (0, 1, 2):
        return Outcome(kind, held=False, words=said)
    committed = newest_step(run)
    for path in (place / "elsewhere").glob("*/checkpoints/step_*"):
        shutil.move(path, run / "checkpoints" / path.name)
    again = roots(*words, limit_s=1500)
    if again.returncode:
        return Outcome(kind, held=False, words=f"{said}; again: {again.stderr[-500:]}")
    return Outcome(kind, held=newest_step(run) >= committed, words=said)


FAMILY = Family(
    "syscalls",
    harm="a call to the kernel fails in a whole run (strace): once, from some call on, or every third time",
    promise="the run ends without a traceback, or goes on; afterwards the same command goes on to the end, and no "
    "committed step is lost",
    trial=trial,
    sample=0,
)
