"""One rank of two is started with another value of one key. Both must say which key, before the first step."""

from __future__ import annotations

import random
import time
from pathlib import Path

from commands import roots

from .hangs import write_run
from .trial import Family, Outcome

CHANGES = (
    "optim.lr=1e-5", "optim.weight_decay=0.3", "optim.clip_grad=0.5", "optim.beta2=0.9", "train.seed=7",
    "train.micro_batch=2", "train.global_batch=8", "train.precision=bf16", "train.recompute=full", "model.hidden=32",
    "model.layers=3", "model.dropout=0.2", "model.activation=relu", "model.norm=rmsnorm", "data.seq_length=16",
    "parallel.tp=1", "parallel.sequence_parallel=true", "checkpoint.every=2", "train.steps=9",
    "advanced.timeout_s=9", "objective.z_loss=0.1",
)  # fmt: skip


def trial(draw: random.Random, place: Path) -> Outcome:
    change, rank = draw.choice(CHANGES), draw.randrange(2)
    config, began = write_run(place, 60), time.time()
    ran = roots("train", str(config), "parallel.tp=2", ranks=2, own_words={rank: [change]}, limit_s=1500)
    key, seconds = change.partition("=")[0], time.time() - began
    files = (place / "run" / "errors").glob("rank_*.txt")  # the terminal is not told the same twice in a minute
    said = ran.stderr + "".join(path.read_text() for path in files)
    named = f"config: {key} = " in said or (key == "parallel.tp" and "layout: layout = " in said)
    no_step = not (place / "run" / "metrics.jsonl").exists()
    held = ran.returncode == 2 and named and no_step and "Traceback" not in ran.stderr
    return Outcome(key, held, "" if held else f"rank {rank}, {seconds:.1f} s: {ran.stderr[-600:]}")


FAMILY = Family(
    "differs",
    harm="one rank of two is started with another value of one key",
    promise="both ranks name the key in one line, and no step is taken",
    trial=trial,
    sample=1,
)
