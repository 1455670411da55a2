"""What all trials have in common: one small real run, and the comparison of every loss that it logs with those of the
same run in one place, from beginning to end.

    config --bare `roots train`--> losses in one place \
           --a launcher, two hosts--> losses            --> compared: the largest difference
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from daemons import until
from namespaces import ROOT, Site, environment

from roots_dist.runs.ranks.stop_signal import read_end

CONFIG = "configs/quickstart.yaml"
SMALL = (
    "model.hidden=96",
    "data.seq_length=128",
    "optim.warmup_steps=5",
    "train.eval_every=8",
    "track.wandb=disabled",
    "track.tensorboard=off",
)
"""The quickstart's GPT, TP2 × PP2 in float32, narrower."""
ROOTS = (sys.executable, "-m", "roots_dist")
"""On any host: the checkout and its Python lie in the file system that all share."""
NOISE = 1e-5
"""Float32 sums in another order, on another number of threads. What is seen is far less, mostly nothing."""


@dataclass
class Trial:
    """Where a run lies, and the words that start it; the same run in one place lies beside it."""

    folder: Path
    steps: int = 24
    every: int = 4
    """Steps between checkpoints."""
    began: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """From here on its seconds count."""
        self.began = time.monotonic()

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def words(self, run: Path | None = None) -> tuple[str, ...]:
        return (
            CONFIG,
            *SMALL,
            f"train.steps={self.steps}",
            f"checkpoint.every={self.every}",
            f"track.folder={run or self.run}",
        )

    def step(self) -> int:
        """The last one that is logged."""
        return max((step for step, key in losses(self.run) if key == "loss/train"), default=0)

    def ended(self) -> str:
        """Why, as the run itself says; empty while it is at work."""
        return read_end(self.run / "ended.txt")

    def finished(self) -> None:
        """Assert that the run has ended well, with the checkpoint of its last step."""
        assert self.ended() == f"finished after step {self.steps}", self.ended()
        assert f"step_{self.steps:08d}" in self.checkpoints()

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").glob("step_*"))


def script(name: str) -> Path:
    """A script of launch/, which is run as it stands, with settings in the environment."""
    return ROOT / "launch" / name


def hostfile(folder: Path, *hosts: str) -> Path:
    """Two slots on each."""
    path = folder / "hostfile"
    path.write_text("".join(f"{host} slots=2\n" for host in hosts))
    return path


def losses(run: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> loss, training's and held-out; of a step that was done twice, after a kill, what was logged
    last."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {(row["step"], key): row[key] for row in rows for key in ("loss/train", "loss/validation") if key in row}


def alone(trial: Trial) -> dict[tuple[int, str], float]:
    """Losses of the same run by a bare `roots train`, on this machine, uninterrupted."""
    run = trial.folder / f"alone-{trial.steps}"
    command = [*ROOTS, "train", *trial.words(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return losses(run)


def compared(trial: Trial, expected: dict[tuple[int, str], float], what: str) -> float:
    """The largest difference among all losses; every step must be there. Says so in one line, for docs/clusters.md."""
    found = losses(trial.run)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    largest = max(abs(found[key] - expected[key]) for key in expected)
    seconds = time.monotonic() - trial.began
    sys.stdout.write(f"\n{what}: {len(expected)} losses, largest difference {largest:.1e}, {seconds:.0f} s\n")
    assert largest <= NOISE
    return largest


def stopped_and_gone_on(trial: Trial, site: Site, words: tuple[object, ...], program: str, number: int) -> int:
    """Start with these words on n1, signal the launcher (its command line has `program` in it) in the midst of it, and
    give the same words again: after which step it was stopped."""
    log = trial.folder / "stopped.log"
    first = site["n1"].start(*words, log=log)
    until(lambda: trial.step() >= 9, 400, "step 9")
    launchers = site["n1"].processes(program)
    assert len(launchers) == 1, launchers
    site["n1"].signal(number, *launchers)
    first.wait(180)
    until(
        lambda: not any(host.processes("-m roots_dist train") for host in site.hosts.values()),
        120,
        "all ranks gone",
        every=1,
    )
    assert trial.ended().startswith("stopped by"), log.read_text()[-4000:]
    step = trial.step()
    assert step < trial.steps and trial.checkpoints() == [f"step_{step:08d}"], (step, trial.checkpoints())
    done = site["n1"].run(*words, timeout=400)
    logs = "".join(path.read_text() for path in (trial.run / "launch").rglob("*.log"))
    said = done.stdout + done.stderr + logs
    assert f"resumed after step {step}" in said, said
    return step
