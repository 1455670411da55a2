"""Closing lines of a finished run: validation before and after, its folder, its curve, what to try next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from roots_dist.config.objectives import OBJECTIVES
from roots_dist.config.schema import Config
from roots_dist.runs.track.curve import draw_curve
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.runs.track.try_next import next_commands
from roots_dist.storage.checkpoint.keep import BEST_FILE

ROWS = {
    "loss/validation": "validation loss",
    "perplexity/validation": "perplexity",
    "bits_per_byte/validation": "bits per byte",
    "f1/validation": "F1",
    "mcc/validation": "MCC",
}
"""Metric -> its name in words."""
NOT_SHOWN = {f"accuracy/validation/{name}" for name, record in OBJECTIVES.items() if record.every_token}
"""Accuracies of next tokens, which say nothing that the perplexity does not."""


def closing_lines(config: Config, folder: Path) -> None:
    """Print the closing lines on rank 0. The figures come from the run's metrics.jsonl."""
    console = Console(highlight=False, soft_wrap=True)
    curve = draw_curve(folder / METRICS_FILE, folder / "curve.png", title=folder.name)
    scores = [line for line in read_lines(folder / METRICS_FILE) if "loss/validation" in line]
    console.print()
    if scores:
        first, last = scores[0], scores[-1]
        table = Table("", f"before (step {first['step']})", f"after (step {last['step']})", box=None, pad_edge=False)
        for label, name in _rows(first):
            table.add_row(label, *("-" if line.get(name) is None else f"{line[name]:.3f}" for line in (first, last)))
        console.print(table)
        if (folder / BEST_FILE).is_file():
            (step, at), (metric, value) = json.loads((folder / BEST_FILE).read_text(encoding="utf-8")).items()
            console.print(f"best: {step} {at}, {metric} {value:.4f}; its checkpoint is kept and used by default")
        console.print()
    console.print(f"run    {folder}")
    console.print(f"curve  {curve}")
    for word, line in zip(("next ", "     "), next_commands(config, folder)):
        console.print(f"{word}  {line}", markup=False)


def _rows(first: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, metric) for each metric of an evaluation. A single accuracy needs no term's name; the accuracy of next
    tokens is left out."""
    alone = sum(name.startswith("accuracy/validation/") for name in first) == 1
    for name in first:
        label = None if name in NOT_SHOWN else label_of(name)
        if label:
            yield label.split(",")[0] if alone else label, name


def label_of(metric: str) -> str | None:
    """Name of a metric in words; None if it is not shown."""
    return f"accuracy, {metric.rpartition('/')[2]}" if metric.startswith("accuracy/validation/") else ROWS.get(metric)
