"""The run's record: metrics.jsonl, one line per log call. Every other view (terminal, W&B, curve) can be made from it.

    {"step": 120, "time": 1760000000.0, "loss/train": 4.21, "speed/tokens_per_s": 18000.0}

A number that is not finite is null, so that every line is JSON. A line is on its way to the disk when log returns.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roots_dist.files import replacing

log = logging.getLogger(__name__)

METRICS_FILE, TEXTS_FILE = "metrics.jsonl", "texts.jsonl"
NAMES = {
    "loss/train": "nats per token of the step's batch",
    "loss/validation": "nats per token of the held-out text",
    "perplexity/validation": "exp(loss/validation)",
    "accuracy/validation/TERM": "share of a term's targets that are the best guess",
    "f1/validation": "of a task with classes: mean over the classes",
    "mcc/validation": "of a task with classes: Matthews correlation",
    "bits_per_byte/validation": "comparable between tokenizers",
    "optim/lr": "learning rate of the step",
    "optim/grad_norm": "of the whole model's gradient, before clipping",
    "optim/grad_norm/decayed": "of what weight decay is for: matrices and embeddings",
    "optim/grad_norm/no_decay": "of norms and biases; …/stepN: of what learns since step N",
    "data/tokens": "tokens since the run's beginning",
    "train/skipped_steps": "since the run's beginning, with train.nonfinite=skip",
    "time/step_s": "seconds per step",
    "time/data_s": "since the last report, the mean over ranks: making the batches",
    "time/compute_s": "forward and backward",
    "time/tp_s": "in them, waiting for the layers' messages of other tensor ranks",
    "time/pp_wait_s": "waiting for other stages: the pipeline's bubble",
    "time/dp_s": "what data ranks have in common: counts, reduction, optimizer",
    "time/evaluate_s": "of this evaluation",
    "time/checkpoint_s": "of this checkpoint",
    "speed/tokens_per_s": "of all ranks together",
    "util/mfu_fraction": "model FLOPs, attention counted causally half, over the devices' peak",
    "plan/step_s": "at least: model FLOPs at the devices' peak, and the bubble",
    "plan/memory_gib": "at least, of each process: weights, gradients, optimizer states",
    "memory/peak_gib": "of the process that needs most",
    "memory/peak_gib/rankN, time/PART_s/rankN": "with advanced.track_ranks: of each rank",
}
"""What each number is. A run may log more."""


class MetricsFile:
    """Appends. Two files in the run's folder: numbers, and texts beside them."""

    def __init__(self, folder: Path, resumed_step: int = 0):
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = [Path(folder) / METRICS_FILE, Path(folder) / TEXTS_FILE]
        for path in paths:
            drop_after(path, resumed_step)
        self._metrics, self._texts = (path.open("a", encoding="utf-8", buffering=1) for path in paths)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(_line({"step": step, "time": round(time.time(), 3), **numbers}))

    def text(self, step: int, name: str, text: str) -> None:
        self._texts.write(_line({"step": step, "time": round(time.time(), 3), "name": name, "text": text}))

    def checkpoint(self, step: int, path: Path) -> None:
        """It stands beside this file."""

    def close(self) -> None:
        self._metrics.close()
        self._texts.close()


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, in order. A line that a kill has torn is left out, with a warning."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
            else:
                log.warning("%s, line %d: not a record, left out", path, number)


def last_step(path: Path) -> int:
    """The last one that was logged; -1: none."""
    return max((record["step"] for record in read_lines(path)), default=-1) if path.exists() else -1


def drop_after(path: Path, step: int) -> None:
    """Keep the records up to and with this step. The file is replaced at once or not at all."""
    if not path.exists():
        return
    with replacing(path) as file:
        file.writelines(_line(record).encode() for record in read_lines(path) if record["step"] <= step)
