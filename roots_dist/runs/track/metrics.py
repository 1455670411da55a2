"""Metrics of a run: metrics.jsonl, one line per log call. All other views (terminal, W&B, curve) can be made from it.

    {"step": 120, "time": 1760000000.0, "loss/train": 4.21, "speed/tokens_per_s": 18000.0}

A number that is not finite becomes null, so that every line is JSON. A line has been handed to the operating system
when log returns, or will be as soon as that is possible (line_file.py).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roots_dist.files import open_lines, replacing
from roots_dist.runs.track.line_file import LineFile
from roots_dist.storage.checkpoint.object_store import Place

log = logging.getLogger(__name__)

METRICS_FILE, TEXTS_FILE = "metrics.jsonl", "texts.jsonl"
LOADS = "experts"
"""Name of the record of tokens per expert, as JSON: layer -> counts since the last report."""
RESUMED = "resumed"
"""Name of the text that says after which step a run was resumed, and in which layout."""
NAMES = {
    "loss/train": "nats per token of the step's batch",
    "loss/validation": "nats per token of the held-out text",
    "perplexity/validation": "exp(loss/validation)",
    "accuracy/validation/TERM": "fraction of a term's targets that are the model's best guess",
    "f1/validation": "tasks with classes: mean F1 over the classes",
    "mcc/validation": "tasks with classes: Matthews correlation",
    "bits_per_byte/validation": "comparable between tokenizers",
    "optim/lr": "learning rate of the step",
    "optim/grad_norm": "norm of the whole model's gradient, before clipping",
    "optim/grad_norm/decayed": "norm over parameters with weight decay: matrices and embeddings",
    "optim/grad_norm/no_decay": "norm over norms and biases; …/stepN: parameters that are trained since step N",
    "data/tokens": "tokens since the run's beginning",
    "train/skipped_steps": "number since the run's beginning, with train.nonfinite=skip or a rule for spikes",
    "train/left_out_samples": "number since the run's beginning, with train.on_spike=rewind",
    "time/step_s": "seconds per step",
    "time/data_s": "waiting for batches; seconds since the last report, mean over ranks, like the next five",
    "time/compute_s": "forward and backward",
    "time/tp_s": "the part of compute_s that waits for messages between tensor ranks",
    "time/cp_s": "the part of compute_s that waits for messages between context ranks",
    "time/pp_wait_s": "waiting for other stages: the pipeline's bubble",
    "time/dp_s": "work shared by data ranks: counts, reduction, optimizer",
    "time/evaluate_s": "seconds of this evaluation",
    "time/checkpoint_s": "seconds for which training waited for this checkpoint",
    "time/save_s": "seconds until a checkpoint was in place, with checkpoint.asynchronous; logged when that is known",
    "time/ep_s": "the part of compute_s that waits for tokens on their way to experts and back",
    "experts/largest_load": "tokens of the expert that got most since the last report, over the mean of its layer",
    "experts/smallest_load": "the same of the expert that got least",
    "experts/entropy": "of the tokens per expert, over that of even ones; mean of layers",
    "experts/dropped": "tokens that an expert did not take: always 0",
    "speed/tokens_per_s": "tokens per second of all ranks together",
    "util/mfu_fraction": "model FLOPs (causal attention counted half) over the devices' peak",
    "plan/step_s": "lower bound: model FLOPs at the devices' peak, and the bubble",
    "plan/memory_gib": "lower bound per process: weights, gradients, optimizer states",
    "memory/peak_gib": "peak of the process that needs most",
    "memory/peak_gib/rankN, time/PART_s/rankN": "the same for each rank, with advanced.track_ranks",
}
"""Metric -> what it is. A run may log more, under sections of its own."""
OURS = frozenset(name.partition("/")[0] for name in NAMES)
"""Sections of these names."""


LONGEST_LINE = 1 << 24
"""Characters of a line, at most: what is longer is no record, and might fill the memory."""


def is_own(name: str) -> bool:
    """True if a metric is the user's: `section/name` with a section that is none of ours."""
    section, slash, rest = name.partition("/")
    return bool(section and slash and rest) and section not in OURS


class MetricsFile:
    """A tracker that appends to two files in the run's folder: one of numbers, one of texts."""

    def __init__(self, folder: Path, resumed_step: int = 0):
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = [Path(folder) / METRICS_FILE, Path(folder) / TEXTS_FILE]
        for path in paths:
            drop_after(path, resumed_step)
        self._metrics, self._texts = map(LineFile, paths)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(_line({"step": step, "time": round(time.time(), 3), **numbers}))

    def text(self, step: int, name: str, text: str) -> None:
        self._texts.write(_line({"step": step, "time": round(time.time(), 3), "name": name, "text": text}))

    def checkpoint(self, step: int, path: Place) -> None:
        """Nothing to write: checkpoints are beside this file."""

    def close(self) -> None:
        self._metrics.close()
        self._texts.close()


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file, in order. A line that was cut off by a kill is skipped, with a warning."""
    with open_lines(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
            if len(line) == LONGEST_LINE and not line.endswith("\n"):
                log.warning("%s, line %d: is longer than any record; it and all that follows are skipped", path, number)
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
            else:
                log.warning("%s, line %d: not a record, skipped", path, number)


def last_step(path: Path) -> int:
    """Last step that was logged; -1 if there is none."""
    return max((record["step"] for record in read_lines(path)), default=-1) if path.exists() else -1


def drop_after(path: Path, step: int) -> None:
    """Keep the records up to and including this step. The file is replaced atomically."""
    if not path.exists():
        return
    with replacing(path) as file:
        file.writelines(_line(record).encode() for record in read_lines(path) if record["step"] <= step)
