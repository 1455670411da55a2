"""Trackers of a run behind one small interface: metrics file, terminal, TensorBoard and W&B.

    callbacks.py: log(step, {"loss/train": …}) --> MetricsFile | ProgressTracker | Background(TensorBoard | Wandb)

Only rank 0 has trackers. On other ranks the list is empty, so callers need no `if`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from roots_dist.config.schema import Config
from roots_dist.runs.track import tensorboard, wandb
from roots_dist.runs.track.background import Background
from roots_dist.runs.track.metrics import METRICS_FILE, RESUMED, MetricsFile, last_step
from roots_dist.runs.track.progress import ProgressTracker
from roots_dist.runs.track.tracker import Tracker, is_wanted
from roots_dist.scrub import known_secrets
from roots_dist.storage.checkpoint.object_store import Place


class Trackers:
    """Several trackers as one; an empty list does nothing."""

    def __init__(
        self,
        trackers: Iterable[Tracker] = (),
        show: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext(),
        file: Tracker | None = None,
    ):
        self._trackers, self._show, self._file = tuple(trackers), show, file

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show on the terminal what delays the next step. It is not recorded."""
        with self._show(what):
            yield

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def text(self, step: int, name: str, text: str) -> None:
        for tracker in self._trackers:
            tracker.text(step, name, text)

    def record(self, step: int, name: str, text: str) -> None:
        """Record what a report reads and nobody watches, in texts.jsonl alone."""
        if self._file is not None:
            self._file.text(step, name, text)

    def checkpoint(self, step: int, path: Place) -> None:
        for tracker in self._trackers:
            tracker.checkpoint(step, path)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_trackers(
    config: Config, folder: Path, *, rank0: bool, resumed_step: int = 0, facts: Mapping[str, object] | None = None
) -> Trackers:
    """Open the trackers of this rank. `facts` (versions, layout, machine) are logged with the run.

    On resume, records after `resumed_step` are dropped from the file, so that no step is logged twice. The file and the
    terminal are written at once, the others in the background. Raises EnvironmentProblem if a tracker that the config
    demands is not installed.
    """
    if not rank0:
        return Trackers()
    facts, known = facts or {}, known_secrets()
    logged_step = last_step(folder / METRICS_FILE) if config.checkpoint.resume else -1
    progress = ProgressTracker(config.train.steps, resumed_step)
    views: list[Tracker] = []
    if is_wanted("tensorboard", config.track.tensorboard):
        views.append(
            Background("TensorBoard", lambda: tensorboard.TensorBoard(config, folder, facts, resumed_step, known))
        )
    if is_wanted("wandb", config.track.wandb):
        views.append(Background("W&B", lambda: wandb.open_wandb(config, folder, facts, logged_step, known)))
    file = MetricsFile(folder, resumed_step)
    if resumed_step:
        file.text(resumed_step, RESUMED, str(facts.get("layout", "")))
    return Trackers([file, progress, *views], progress.doing, file)
