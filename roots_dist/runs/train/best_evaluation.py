"""Which evaluation was the best so far, and whether it is time to stop (Prechelt 1998: no better one for a while).

    evaluate --note(step, metrics)--> Best --> duties.py: keep that checkpoint; loop.py: stop

Saved with each checkpoint, so that a resumed run stops where the whole one would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roots_dist.config.schema import Config
from roots_dist.files import write_atomically
from roots_dist.storage.checkpoint.keep import BEST_FILE


@dataclass
class BestEvaluation:
    metric: str
    """as logged: loss/validation, accuracy/validation/classify …"""
    patience: int
    """evaluations; 0: it never stops"""
    step: int = 0
    """0: nothing has been evaluated since the start"""
    value: float | None = None
    waited: int = 0
    """evaluations since the best one"""

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation after `step` steps. What the model was at first is no checkpoint, and is not counted."""
        if step == 0:
            return
        value = metrics[self.metric]
        falls = self.metric.startswith("loss/")
        if self.value is None or (value < self.value if falls else value > self.value):
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.waited

    def mark(self, folder: Path) -> None:
        """Say in the run's folder which checkpoint it is. On rank 0, once that checkpoint is whole."""
        write_atomically(folder / BEST_FILE, json.dumps({"step": self.step, self.metric: self.value}) + "\n")

    def saved(self) -> dict[str, object]:
        return asdict(self)


def best_evaluation(config: Config, saved: Mapping[str, object]) -> BestEvaluation | None:
    """Of a run that fine-tunes, or that may stop early; gone on with from what a checkpoint says, if it is the same
    metric."""
    f = config.finetune
    if (f.init_from is None and not f.patience) or not config.data.validation:
        return None
    metric = {"loss": "loss/validation", "accuracy": f"accuracy/validation/{config.objective.name}"}.get(
        f.metric, f"{f.metric}/validation"
    )
    told: dict[str, Any] = (
        {key: saved[key] for key in ("step", "value", "waited")} if saved.get("metric") == metric else {}
    )
    return BestEvaluation(metric, f.patience, **told)
