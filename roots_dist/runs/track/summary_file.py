"""Summary of a finished run for scripts that compare runs: summary.json in its folder.

metrics.jsonl + config --summary--> {"layout": …, "loss/validation": …} --write_summary--> summary.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from roots_dist.accounting.flops import CONVENTION
from roots_dist.accounting.sizes import parameters
from roots_dist.config.schema import Config
from roots_dist.files import write_atomically
from roots_dist.layout import Layout
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines

SUMMARY_FILE = "summary.json"
LAST = (
    "loss/train", "loss/validation", "perplexity/validation", "bits_per_byte/validation", "f1/validation",
    "mcc/validation", "memory/peak_gib", "train/skipped_steps",
)  # fmt: skip
"""Metrics whose last value is kept."""


def summary(records: Iterable[Mapping[str, Any]], config: Config, layout: Layout) -> dict[str, object]:
    """Summary of the records. Seconds count the steps before and after interruptions, without evaluation and
    checkpoints."""
    last: dict[str, object] = {}
    before: dict[str, object] = {}
    seconds, flop_share, step = 0.0, 0.0, 0
    for record in records:
        last |= {
            name: value for name, value in record.items() if name in LAST or name.startswith("accuracy/validation/")
        }
        if "loss/validation" in record:
            before = before or {"loss/validation/before": record["loss/validation"]}
        if record.get("time/step_s"):
            took = record["time/step_s"] * (record["step"] - step)
            seconds, step = seconds + took, record["step"]
            flop_share += took * (record.get("util/mfu_fraction") or 0.0)
            last["data/tokens"] = record["data/tokens"]
    found = {
        "layout": str(layout),
        "processes": layout.world_size,
        "parallel": config.parallel.model_dump(mode="json"),
        "parameters": parameters(config),
        "steps": config.train.steps,
        **before,
        **last,
        "time/training_s": seconds,
    }
    if seconds:
        found["speed/tokens_per_s"] = last["data/tokens"] / seconds  # type: ignore[operator]
    if flop_share:
        found |= {"util/mfu_fraction": flop_share / seconds, "util/mfu_convention": CONVENTION}
    return found


def write_summary(config: Config, layout: Layout, folder: Path) -> Path:
    """Write summary.json from the run's metrics.jsonl, atomically."""
    found = summary(read_lines(folder / METRICS_FILE), config, layout)
    path = folder / SUMMARY_FILE
    write_atomically(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return path
