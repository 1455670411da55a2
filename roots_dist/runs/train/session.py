"""What a training run holds besides the step: its folder, its held-out text, its trackers, where it stands."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from roots_dist import environment
from roots_dist.accounting.bounds import Bounds
from roots_dist.assembly.run import Run
from roots_dist.config.batch_ramp import samples_before
from roots_dist.config.load import CONFIG_FILE, to_yaml
from roots_dist.config.schema import Config
from roots_dist.files import write_atomically
from roots_dist.layout import Layout
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.tokenizer import Codec
from roots_dist.runs.evaluate.sources import bytes_per_token
from roots_dist.runs.track.machine import machine_facts
from roots_dist.runs.track.trackers import Trackers
from roots_dist.runs.train.best import Best
from roots_dist.scrub import known_secrets, scrub
from roots_dist.world.mesh import Mesh


@dataclass
class Session:
    """step, saved, skipped and best are all that changes here."""

    config: Config
    run: Run
    folder: Path
    training: Batches
    held_out: Batches | None
    tokenizer: Codec | None
    trackers: Trackers
    peak_flops: float | None
    """FLOP/s of all devices of the run together, at best; None where it is not known."""
    bounds: Bounds
    """What a step and a process take at least."""
    best: Best | None = None
    """Where the best checkpoint is kept, or the run may stop early."""
    step: int = 0
    """How many steps have been done."""
    saved: int = field(default=0, init=False)
    """After which of them the last checkpoint was written."""
    skipped: int = 0
    """How many of them changed nothing, since a number was not finite."""
    bytes_per_token: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_per_token = bytes_per_token(self.config.data.validation)
        self.saved = self.step

    @property
    def mesh(self) -> Mesh:
        return self.run.mesh

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return samples_before(self.config.train, self.step) * self.config.data.seq_length

    @property
    def goes_on(self) -> bool:
        return self.step < self.config.train.steps and not (self.best and self.best.over)

    def why_over(self) -> str:
        if self.step < self.config.train.steps:
            return f"stopped after step {self.step}: no better evaluation since step {self.best.step}; a larger finetune.patience goes on"
        return f"all {self.step} steps are done already; a larger train.steps goes on from here"


def without_secrets(config: Config) -> Config:
    """What a run is called, as it may stand in its files. Paths stay: they are read by."""
    said = {
        "name": config.track.name,
        "project": config.track.project,
        "group": config.track.group,
        "tags": config.track.tags,
    }
    return config.changed({f"track.{key}": value for key, value in scrub(said, known_secrets()).items()})


def write_origin(folder: Path, config: Config, layout: Layout, bound: Mapping[str, object]) -> dict[str, object]:
    """Keep with the run what it takes to repeat it: resolved config, versions, machine, git commit; and what it takes at
    least (accounting/bounds.py). On rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / CONFIG_FILE, to_yaml(config)
    )  # a full disk must not cost the config that the checkpoints need
    facts = scrub({**machine_facts(), "layout": str(layout), "git_commit": git_commit(), **bound}, known_secrets())
    write_atomically(folder / "origin.json", json.dumps(facts, indent=1) + "\n")
    return facts


def git_commit() -> str | None:
    """Of the checkout that this code runs from, with a + if it has changes; of an image what it was built with; else None."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return environment.commit()
