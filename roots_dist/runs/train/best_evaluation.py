"""Best evaluation of a run so far, and early stopping: whether there was none better for a while (Prechelt 1998).

    evaluate --note(step, metrics)--> BestEvaluation --> callbacks.py: keep that checkpoint; loop.py: stop

Saved with each checkpoint, so that a resumed run stops at the same step as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roots_dist.config.schema import Config
from roots_dist.files import write_atomically
from roots_dist.storage.checkpoint.keep import BEST_FILE, best_step, found_steps


@dataclass
class BestEvaluation:
    metric: str
    """Name as in metrics.jsonl: loss/validation, accuracy/validation/classify, ..."""
    patience: int
    """Number of evaluations without improvement after which the run stops; 0 never stops it."""
    step: int = 0
    """Step of the best evaluation; 0 if there was none yet."""
    value: float | None = None
    waited: int = 0
    """Number of evaluations since the best one."""

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the evaluation after `step` steps. Step 0 does not count, because it has no checkpoint."""
        if step == 0:
            return
        value = metrics[self.metric]
        lower_is_better = self.metric.startswith("loss/")
        is_better = self.value is None or (value < self.value if lower_is_better else value > self.value)
        if is_better and math.isfinite(value):
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.waited

    def mark(self, folder: Path, step: int = 0) -> None:
        """Write into the run's folder which checkpoint is the best: that of the best evaluation, or of `step`, which
        takes its place where it could not be saved. Rank 0 calls it once that checkpoint is complete."""
        write_atomically(folder / BEST_FILE, json.dumps({"step": step or self.step, self.metric: self.value}) + "\n")

    def mark_again(self, folder: Path) -> None:
        """Mark what a resumed run knows as its best: later checkpoints may be gone. One that has taken the place of the
        best stays marked. Rank 0 calls it."""
        there = found_steps(folder)
        marked = best_step(folder) or 0
        self.mark(folder, marked if self.step not in there and self.step < marked and marked in there else 0)

    def saved(self) -> dict[str, object]:
        return asdict(self)


def best_evaluation(config: Config, saved: Mapping[str, object]) -> BestEvaluation | None:
    """Best evaluation of a run that fine-tunes or may stop early, else None. It continues from `saved`, the state in a
    checkpoint, if the metric is the same."""
    f = config.finetune
    if not config.keeps_best():
        return None
    metric = {"loss": "loss/validation", "accuracy": f"accuracy/validation/{config.objective.name}"}.get(
        f.metric, f"{f.metric}/validation"
    )
    earlier: dict[str, Any] = (
        {key: saved[key] for key in ("step", "value", "waited")} if saved.get("metric") == metric else {}
    )
    return BestEvaluation(metric, f.patience, **earlier)
