"""The same failure three times stops a job: a supervisor that starts the command again would repeat it for ever.

    a step fails --note_failure--> RUN/failures.json --three of one step, cause and config--> refuse_repeats: exit 2

What counts is what a rank says of itself, and a hang: an exception with a type and words, after the first step has
begun. A kill does not count, nor does what the other ranks say then: a node that is taken away three times is no fault
of the run. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from roots_dist.config.schema import Config
from roots_dist.errors import Problem, UserError
from roots_dist.failures import is_consequence, write_if_possible
from roots_dist.files import read_json_object
from roots_dist.storage.checkpoint.format import digest
from roots_dist.storage.checkpoint.keep import found_steps
from roots_dist.storage.checkpoint.run_identity import RUN_FILE
from roots_dist.world.progress import Progress

FAILURES_FILE = "failures.json"
MOST = 3
"""Number of equal failures after which the run is not started again."""
KEPT = 64
"""Number of failures that are kept, the newest."""
VARIES = re.compile(r"node \S+|0x[0-9a-f]+|\d+(\.\d+)?(e[+-]?\d+)?")
"""Parts that differ between two reports of one failure: the machine, addresses and numbers."""


@dataclass(frozen=True)
class Failure:
    """The end of one start of a run."""

    attempt: int
    """The start, as run.json counts them."""
    step: int
    """The step that was being done, counted from 1."""
    cause: str
    config: str
    """Digest of the config, but for where the run is kept and how it is called."""

    def repeats(self, other: Failure) -> bool:
        same = VARIES.sub("#", self.cause) == VARIES.sub("#", other.cause)
        return same and (self.step, self.config) == (other.step, other.config)


@contextmanager
def noting_failures(folder: Path, config: Config, progress: Progress) -> Iterator[None]:
    """Note how the body fails, if it has begun a step and no other rank is the cause."""
    try:
        yield
    except Exception as error:
        if not is_consequence(error):
            line = (str(error).splitlines() or [""])[0]
            note_failure(folder, config, progress.step, f"{type(error).__name__}: {line}")
        raise


def note_failure(folder: Path, config: Config, step: int, cause: str) -> None:
    """Add a failure to the run's, once for each start of the run. Nothing is written before the first step, or where
    the folder has gone; what cannot be written (a full disk) hides no error."""
    if not step or not folder.is_dir():
        return
    found, attempt = read_failures(folder), _attempt(folder)
    if all(failure.attempt != attempt for failure in found):
        found.append(Failure(attempt, step, cause, _digest(config)))
        text = json.dumps({"failures": [asdict(failure) for failure in found[-KEPT:]]}, indent=1)
        write_if_possible(folder / FAILURES_FILE, text + "\n")


def read_failures(folder: Path) -> list[Failure]:
    """The run's failures, oldest first; none if the file is not there or is damaged: they only save time."""
    try:
        found = [Failure(**failure) for failure in read_json_object(folder / FAILURES_FILE)["failures"]]
    except (KeyError, TypeError):
        return []
    kinds = {"attempt": int, "step": int, "cause": str, "config": str}
    sound = all(isinstance(getattr(failure, key), kind) for failure in found for key, kind in kinds.items())
    return found if sound else []


def _digest(config: Config) -> str:
    return digest(config.model_dump(mode="json", exclude={"track"}))


def _attempt(folder: Path) -> int:
    attempt = read_json_object(folder / RUN_FILE).get("attempt")
    return attempt if isinstance(attempt, int) else 0


def refuse_repeats(config: Config) -> None:
    """Raise UserError if the run has failed in the same way too often, and has no checkpoint beyond that step;
    EnvironmentProblem if the place of its checkpoints does not answer."""
    folder = Path(config.track.folder)
    failures = read_failures(folder) if config.checkpoint.resume else []
    if not failures or failures[-1].config != _digest(config):
        return
    last = failures[-1]
    count = sum(failure.repeats(last) for failure in failures)
    if count < MOST or max(found_steps(folder), default=0) >= last.step:
        return
    problem = Problem(
        key="track.folder",
        found=str(folder),
        expected=f"a run that gets beyond step {last.step}, where it has failed {count} times in the same way "
        f"({last.cause.partition('. Fix: ')[0][:200].rstrip('.')})",
        fix=f"see to the cause: a changed config counts anew; or remove {folder / FAILURES_FILE} to try again as it is",
    )
    raise UserError(str(problem))
