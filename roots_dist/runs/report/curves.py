"""Curves of a report page: losses with what happened along the run, a user's own numbers, and rates step by step."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from roots_dist.runs.report.charts import Line, legend, line_chart
from roots_dist.runs.report.markup import section, tag
from roots_dist.runs.report.run_record import RunRecord
from roots_dist.runs.track.curve import resumes, smooth, window
from roots_dist.runs.track.metrics import is_own

SMALL = (
    ("optim/lr", "learning rate"),
    ("optim/grad_norm", "gradient norm, before clipping"),
    ("speed/tokens_per_s", "tokens per second"),
    ("util/mfu_fraction", "MFU, as a fraction"),
)


def losses(runs: Sequence[RunRecord]) -> Element:
    lines, trained, validations = [], [], []
    for index, run in enumerate(runs):
        (steps, values), (at, validation) = run.series("loss/train"), run.series("loss/validation")
        trained += values
        validations += validation
        lines += [
            Line(steps, values, index, "faint"),
            Line(steps, smooth(values), index),
            Line(at, validation, index, "dots"),
        ]
    marks = [(step, index) for index, run in enumerate(runs) for step in run.nonfinite_steps]
    shown = _window(runs)
    events = [
        (step, f"resumed as {layout}", index) for index, run in enumerate(runs) for step, layout in resumes(run.texts)
    ]
    words = "Training loss per step (faint) and smoothed, validation loss (dashed), in nats per target"
    words += "; × marks a step whose loss or gradient was not finite" if marks else ""
    beyond = shown is not None and any(not shown[0] <= value <= shown[1] for value in trained + validations)
    words += "; ▲ a value beyond the picture." if beyond else "."
    for run in runs:
        begun_again = ", ".join(f"step {step:,} as {layout}" for step, layout in resumes(run.texts))
        words += f" {run.name} was resumed after {begun_again}." if begun_again else ""
    objectives = {run.config.get("objective.name") for run in runs}
    if len(objectives) > 1:
        words += " These runs have different objectives, so their losses cannot be compared."
    chart = tag("div", _loss_chart(lines, shown, marks, events), class_="wide")
    return section("Loss", legend([(run.name, i) for i, run in enumerate(runs)]), chart, tag("p", words, class_="dim"))


def _loss_chart(
    lines: Sequence[Line],
    shown: tuple[float, float] | None,
    marks: Sequence[tuple[int, int]],
    events: Sequence[tuple[int, str, int]],
) -> Element:
    unit = "loss, nats per target"
    return line_chart(lines, "loss", window=shown, marks=marks, events=events, unit=unit, height=360.0)


def own_metrics(runs: Sequence[RunRecord]) -> Element | None:
    """Curves of the numbers that a user's own functions returned."""
    found = dict.fromkeys(name for run in runs for record in run.records for name in record if is_own(name))
    figures = []
    for metric in found:
        lines = [Line(*run.series(metric), index) for index, run in enumerate(runs)]
        figures.append(tag("figure", tag("figcaption", metric), line_chart(lines, metric, width=480.0, height=210.0)))
    return section("Your own numbers", tag("div", figures, class_="two")) if figures else None


def _window(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """Limits of the loss axis: the union of each run's, none of which one spike can stretch."""
    found = [
        window(losses or validation, validation)
        for losses, validation in ((run.series("loss/train")[1], run.series("loss/validation")[1]) for run in runs)
        if losses or validation
    ]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def rates(runs: Sequence[RunRecord]) -> Element:
    figures = []
    for metric, words in SMALL:
        lines = [Line(*run.series(metric), index, "thin") for index, run in enumerate(runs)]
        high = [sorted(line.values)[int(0.99 * (len(line.values) - 1))] for line in lines if line.values]
        shown = (0.0, 1.15 * max(high)) if high else None  # the first step of a run is slow and would stretch the axis
        figures.append(
            tag("figure", tag("figcaption", words), line_chart(lines, words, window=shown, width=480.0, height=210.0))
        )
    return section("Step by step", tag("div", figures, class_="two"))
