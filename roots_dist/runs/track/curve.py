"""Loss curve of a run as a PNG, drawn from metrics.jsonl alone: during a run, after it, or on another machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roots_dist.files import replacing
from roots_dist.runs.track.metrics import RESUMED, TEXTS_FILE, read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes


BLUE, ORANGE, GREY, INK = "#2f6db5", "#d9622b", "#8a8f98", "#2b2f36"


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without values that are not finite."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value's neighbours on both sides, which unlike a moving average of the past does not lag behind. The
    window is 5 % of the run, and narrower at its start, where the curve is steep."""
    sums = [0.0, *itertools.accumulate(values)]
    n, out = len(values), []
    for i in range(n):
        half = min(n // 40, i // 4)
        low, high = i - half, min(i + half + 1, n)
        out.append((sums[high] - sums[low]) / (high - low))
    return out


def _short(value: float, _: object = None) -> str:
    for unit in ("", "k", "M", "G", "T"):  # noqa: B007 # read after the loop
        if abs(value) < 1000:
            break
        value /= 1000
    return f"{value:g}{unit}"


def draw_curve(metrics: Path, png: Path, title: str = "") -> Path:
    """Draw the training loss (each step, and smoothed), the validation loss, and the learning rate below. Returns
    `png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot has global state and looks for a display
    from matplotlib.figure import Figure

    records = list(read_lines(metrics))
    steps, losses = series(records, "loss/train")
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))

    if steps:
        top.plot(steps, losses, color=BLUE, alpha=0.28, linewidth=0.9, label="training, each step")
        top.plot(steps, smooth(losses), color=BLUE, linewidth=2.0, label="training, smoothed")
        top.set_ylim(*window(losses, series(records, "loss/validation")[1]))
    at, validation = series(records, "loss/validation")
    if at:
        style = {"color": ORANGE, "markersize": 5.5, "linewidth": 1.2, "markeredgecolor": "white"}
        top.plot(at, validation, "o-", label="validation", **style)
        top.annotate(
            f"{validation[-1]:.3f}",
            (at[-1], validation[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            color=ORANGE,
            weight="bold",
        )
    _mark_resumes(top, metrics.with_name(TEXTS_FILE))
    top.set_ylabel("loss (nats per token)")
    if steps or at:
        top.legend(frameon=False, labelcolor=INK)
    bottom.plot(*series(records, "optim/lr"), color=GREY, linewidth=1.6)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.18)
        axes.tick_params(colors=INK)
        axes.margins(x=0.01)
    _tokens_above(top, records)
    if title:
        figure.suptitle(title, color=INK, weight="bold")
    with replacing(png) as file:
        figure.savefig(file, format="png")
    return png


def resumes(texts: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Steps after which a run was resumed, each with the layout in which it went on."""
    return [(one["step"], str(one.get("text", ""))) for one in texts if one.get("name") == RESUMED]


def _mark_resumes(axes: Axes, texts: Path) -> None:
    for step, layout in resumes(read_lines(texts)) if texts.is_file() else ():
        axes.axvline(step, color=GREY, linewidth=1.0, linestyle=":")
        axes.annotate(
            f"resumed, {layout}",
            (step, axes.get_ylim()[1]),
            xytext=(3, -3),
            textcoords="offset points",
            rotation=90,
            fontsize=7,
            color=GREY,
            va="top",  # where curves that fall have left room
        )


def window(losses: Sequence[float], validation: Sequence[float]) -> tuple[float, float]:
    """Limits of the y axis that one spike cannot stretch: they hold everything up to the first loss, and most of what
    lies above it."""
    ranked = sorted(losses)
    high = max([ranked[math.ceil(0.995 * (len(ranked) - 1))], losses[0], *validation])
    low = min([ranked[0], *validation])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _tokens_above(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    """Add a scale of tokens on top. It need not be linear in steps, because the batch may grow."""
    steps, tokens = series(records, "data/tokens")
    if len(steps) < 2:
        return
    import numpy as np

    slope = (tokens[-1] - tokens[-2]) / (steps[-1] - steps[-2])
    beyond = steps[-1]  # the axis is a little longer than the run: extrapolate linearly at both ends
    steps = [-beyond, 0, *steps, 2 * beyond]
    tokens = [-slope * beyond, 0, *tokens, tokens[-1] + slope * beyond]
    above = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: np.interp(np.asarray(x, float), steps, tokens),
            lambda t: np.interp(np.asarray(t, float), tokens, steps),
        ),
    )
    above.set_xlabel("tokens")
    above.xaxis.set_major_formatter(_short)
    above.tick_params(colors=INK)
