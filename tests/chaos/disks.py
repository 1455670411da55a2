"""Disks that refuse: full, with I/O errors, read-only, at a random call of a save, once or for a while."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from roots_dist.errors import CheckpointError
from roots_dist.runs.train.resume import resume
from roots_dist.storage.checkpoint.keep import found_steps

from .small_run import save_step, small_run, step_of_weights
from .trial import Family, Outcome

ERRORS = {"full": errno.ENOSPC, "I/O errors": errno.EIO, "read-only": errno.EROFS, "quota": errno.EDQUOT}
CALLS = ("mkdir", "open", "write", "fsync", "rename")


def trial(draw: random.Random, place: Path) -> Outcome:
    """Save step 1, step 2 on a disk that refuses from some call on, for some calls, and step 3 on a sound one."""
    kind, run = draw.choice(list(ERRORS)), small_run()
    save_step(run, place, 1)
    first, count = draw.randrange(60), draw.choice([1, 5, 10_000])
    seen = 0

    def refuses(function: Any, writes: bool) -> Any:
        def asked(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if writes or args[1] & os.O_CREAT:
                seen += 1
                if first < seen <= first + count:
                    raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
            return function(*args, **kwargs)

        return asked

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, refuses(getattr(os, name), writes=name != "open"))
        try:
            save_step(run, place, 2)
        except CheckpointError as error:
            said = str(error)
        else:
            said = ""
    if said and os.strerror(ERRORS[kind]) not in said:
        return Outcome(kind, held=False, words=f"said: {said}")
    after_failure = small_run()
    step = resume(after_failure, place).step
    if step not in ((1, 2) if said else (2,)) or step != step_of_weights(after_failure):
        return Outcome(kind, held=False, words=f"step {step} is found, the save said {said or 'nothing'}")
    save_step(run, place, 3)
    again = small_run()
    left = [path.name for path in (place / "checkpoints").iterdir() if path.name.startswith(".")]
    held = resume(again, place).step == 3 == step_of_weights(again) and not left and 1 in found_steps(place)
    return Outcome(kind, held, "" if held else f"after a sound save: {left}")


FAMILY = Family(
    "disks",
    harm="a disk refuses calls of a save (full, I/O errors, read-only, quota), from a random one on, for some or all",
    promise="the save says so, the checkpoint before is found whole, and the next save succeeds and leaves no litter",
    trial=trial,
    sample=4,
)
