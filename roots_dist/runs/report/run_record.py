"""Data of a run for a report: the files of its folder, with secrets removed.

    RUN/{config.yaml, metrics.jsonl, texts.jsonl, origin.json, summary.json} --read_runs--> RunRecord --> page.py

A run may be active, have just begun, or come from another version: what is missing is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from roots_dist.accounting.sizes import parameters
from roots_dist.config.load import CONFIG_FILE
from roots_dist.config.schema import Config
from roots_dist.config.text import parse_file
from roots_dist.errors import ConfigError, Problem, UserError
from roots_dist.files import read_json_object
from roots_dist.layout import Layout
from roots_dist.runs.track.curve import series
from roots_dist.runs.track.metrics import METRICS_FILE, TEXTS_FILE, read_lines
from roots_dist.runs.track.summary_file import SUMMARY_FILE
from roots_dist.scrub import scrub, scrub_text
from roots_dist.storage.checkpoint.folder_lock import LOCK_FILE
from roots_dist.storage.checkpoint.format import CHECKPOINTS, URL_FILE
from roots_dist.storage.checkpoint.keep import steps_in
from roots_dist.world.stopwatch import PARTS

STEP_PARTS = {
    "compute": "forward, backward",
    "tp": "waiting for tensor ranks",
    "cp": "waiting for context ranks",
    "ep": "waiting for experts",
    "pp_wait": "waiting for stages",
    "dp": "reduction, optimizer",
    "data": "batches",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "rest": "rest of the step",
    "step": "steps, not split",
}
"""Part of a run's time -> its name in words. The last one is for runs whose steps were not split."""


@dataclass(frozen=True)
class RunRecord:
    name: str
    records: Sequence[Mapping[str, object]]
    texts: Sequence[Mapping[str, object]]
    config: Mapping[str, object]
    """`section.key` -> value."""
    origin: Mapping[str, object]
    summary: Mapping[str, object]
    layout: Layout | None
    parameters: int | None
    saved_step: int = 0
    """Step of the newest checkpoint beside the run's config."""

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        return series(self.records, metric)

    def last(self, metric: str) -> float | None:
        values = self.series(metric)[1]
        return values[-1] if values else None

    def last_step_of(self, metric: str) -> int | None:
        """Step of the last value of a metric."""
        steps = self.series(metric)[0]
        return steps[-1] if steps else None

    @cached_property
    def nonfinite_steps(self) -> list[int]:
        """Steps whose loss or gradient was not finite."""
        names = ("loss/train", "optim/grad_norm")
        return [r["step"] for r in self.records if any(name in r and r[name] is None for name in names)]  # type: ignore[misc]

    @property
    def step(self) -> int:
        """Last step that was logged or saved: a program that takes the steps itself logs none."""
        return max([self.saved_step, *(record["step"] for record in self.records)])  # type: ignore[type-var, return-value]

    @property
    def steps(self) -> int | None:
        wanted = self.config.get("train.steps")
        return wanted if isinstance(wanted, int) else None

    @property
    def state(self) -> str:
        if not self.records and not self.saved_step:
            return "nothing logged yet"
        if self.steps is None or self.step >= self.steps:
            return "done"
        summarized = self.summary.get(
            "data/tokens"
        )  # a summary is written at the end; one from before a resume has fewer tokens
        return (
            "ended early"
            if summarized is not None and summarized == self.last("data/tokens")
            else "running, or interrupted"
        )

    def seconds(self) -> dict[str, float]:
        """Seconds of all logged steps by part."""
        found = dict.fromkeys(STEP_PARTS, 0.0)
        total, before = 0.0, 0
        for record in self.records:
            for part in list(STEP_PARTS)[:-2]:
                value = record.get(f"time/{part}_s")
                found[part] += value if isinstance(value, (int, float)) else 0.0
            per_step = record.get("time/step_s")
            if isinstance(per_step, (int, float)):
                total += per_step * max(0, record["step"] - before)  # type: ignore[operator]
                before = record["step"]  # type: ignore[assignment]
        inside = sum(found[part] for part in PARTS)
        found["rest" if inside else "step"] = max(0.0, total - inside)
        return {part: seconds for part, seconds in found.items() if seconds > 0}


WRITTEN = (METRICS_FILE, "origin.json", SUMMARY_FILE, CHECKPOINTS, URL_FILE, LOCK_FILE)
"""Files that a run writes beside its config."""


def is_run(folder: Path) -> bool:
    """True if a run, or an import, has written into a folder: a config.yaml alone is that of a run to come."""
    return (folder / CONFIG_FILE).is_file() and any((folder / name).exists() for name in WRITTEN)


def read_runs(folders: Sequence[Path], known: Collection[str]) -> list[RunRecord]:
    """Read runs, each under a unique name. Raises UserError naming a folder that holds no run."""
    runs = [_read(folder, known) for folder in folders]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=scrub_text(str(folder), known))
        for folder, run in zip(folders, runs)
    ]


def _read(folder: Path, known: Collection[str]) -> RunRecord:
    config_file, metrics = folder / CONFIG_FILE, folder / METRICS_FILE
    if not is_run(folder) and not metrics.is_file():
        expected, fix = (
            f"the folder of a run, with config.yaml or {METRICS_FILE}",
            "name a track.folder, as runs/quickstart",
        )
        if config_file.is_file():
            expected = "the folder of a run: this one has a config, but nothing that a run has written"
            fix = f"train it first (roots train {config_file}), and name its track.folder"
        raise UserError(Problem(key="RUN", found=str(folder), expected=expected, fix=fix))
    tree = parse_file(config_file)[0] if config_file.is_file() else {}
    records, texts = ([*read_lines(path)] if path.is_file() else [] for path in (metrics, folder / TEXTS_FILE))
    origin, summary = (read_json_object(folder / name) for name in ("origin.json", SUMMARY_FILE))
    flat = {f"{s}.{k}": v for s, keys in tree.items() if isinstance(keys, dict) for k, v in keys.items()}
    return RunRecord(
        name=scrub_text(str(flat.get("track.name") or folder.resolve().name), known),
        records=records,
        texts=texts,
        config=scrub(flat, known),
        origin=scrub(origin, known),
        summary=summary,
        layout=layout_of(str(origin.get("layout"))),
        parameters=_parameters(tree),
        saved_step=max(steps_in(folder / CHECKPOINTS), default=0),
    )


def layout_of(words: str) -> Layout | None:
    """Layout from text like `TP2×PP2×DP1` or `TP1×PP1×DP4 EP2`; None if it is none."""
    parts = {part[:2].lower(): part[2:] for part in words.replace(" ", "×").split("×")}
    if set(parts) | {"cp", "ep"} != {"tp", "cp", "pp", "dp", "ep"} or not all(
        n.isascii() and n.isdecimal() and int(n) > 0 for n in parts.values()
    ):
        return None
    sizes = {axis: int(n) for axis, n in parts.items()}
    return Layout(**sizes) if sizes["dp"] * sizes.get("cp", 1) % sizes.get("ep", 1) == 0 else None


def _parameters(tree: dict[str, Any]) -> int | None:
    """Size of the model; None for names that an extension has added: a run's folder runs no code."""
    advanced = tree.get("advanced")
    kept = {key: value for key, value in advanced.items() if key != "extensions"} if isinstance(advanced, dict) else {}
    try:
        return parameters(Config.from_record({**tree, "advanced": kept}))
    except (ValidationError, ConfigError, ArithmeticError, AssertionError, KeyError):
        return None  # another version's config
