"""Draw a schedule: as text for a terminal or a docstring, or as an image.

    check.py --Played--> to_text, to_png;  `roots schedule NAME --ranks P --microbatches M` calls describe

What is drawn is what was played: the list of actions that the executor runs, at the times that the player found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roots_dist.errors import UserError
from roots_dist.schedule.actions import Action, Kind
from roots_dist.schedule.check import Played, Span, play
from roots_dist.schedule.program import whole_program
from roots_dist.schedule.schedules import SCHEDULES, expected_bubble, expected_peak

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

COLOURS = {Kind.FORWARD: "#3f77b5", Kind.BACKWARD: "#3c9a78", Kind.INPUT: "#3c9a78", Kind.WEIGHT: "#e0a33a"}
WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward for the input",
    Kind.WEIGHT: "backward for the weights",
}
INK, IDLE = "#22313f", "#eceff1"
NO_FORMULA = "(no closed form)"
LINES = 60
"""Images with more lines than this have no numbers."""
MOST = 20_000
"""Largest number of forwards that describe draws; more would take minutes and be unreadable."""


def describe(name: str, ranks: int, microbatches: int, chunks: int = 1, png: str | Path | None = None) -> str:
    """The text of `roots schedule`; also writes the image if requested.

    Raises UserError for an impossible shape, one too large to draw, or a file that cannot be written.
    """
    if ranks * microbatches * chunks > MOST:
        raise UserError(
            f"ranks × microbatches × virtual stages = {ranks * microbatches * chunks}: expected at most {MOST} to "
            f"draw. Fix: lower one of them, the pattern stays the same"
        )
    played = play(whole_program(name, ranks, microbatches, chunks))
    bubble = expected_bubble(name, ranks, microbatches, chunks)
    peak = expected_peak(name, ranks, microbatches, chunks)
    picture = to_text(played)
    lines = [
        _title(name, ranks, microbatches, chunks),
        "",
        picture if picture.count("\n") < LINES else to_text(played, numbers=False),
        "",
        _key(played),
        f"bubble  {played.bubble:.1%} of the ideal time, {played.bubble_share:.1%} of the whole "
        + (NO_FORMULA if bubble is None else f"(formula: {bubble:.1%} of the ideal)"),
        f"peak    {_listed(played.peak)} activations of a stage held at once, rank by rank "
        + (NO_FORMULA if peak is None else f"(formula: {_listed(peak)})"),
    ]
    if png is not None:
        try:
            to_png(played, png, _title(name, ranks, microbatches, chunks))
        except OSError as error:
            raise UserError(
                f"png = {str(png)!r}: expected a file that can be written, found: {error.strerror}. "
                f"Fix: name one in a folder that exists"
            ) from error
        lines.append(f"picture {png}")
    return "\n".join(lines)


def to_text(played: Played, width: int = 120, numbers: bool = True) -> str:
    """One line per rank, one cell per unit of time (the shortest action); lines wider than `width` continue below.

    F0 begins the forward of microbatch 0, -- goes on; with chunks a letter tells them apart: F0a, F0b. Without numbers
    a cell is one character.
    """
    unit = min(span.end - span.start for spans in played.timeline for span in spans if span.end > span.start)
    labels = {
        span.action: _label(played, span.action) if numbers else span.action.kind.value
        for spans in played.timeline
        for span in spans
    }
    gap = " " if numbers else ""
    cell = max(len(label) for label in labels.values())
    rows = []
    for spans in played.timeline:
        row = [" " * cell] * round(played.makespan / unit)
        for action, start, end in spans:
            first, last = round(start / unit), max(round(end / unit), round(start / unit) + 1)
            row[first:last] = [labels[action].ljust(cell), *["-" * cell] * (last - first - 1)]
        rows.append(row)

    margin = [f"rank {str(rank).rjust(len(str(len(rows) - 1)))} |" for rank in range(len(rows))]
    per_panel = max((width - len(margin[0]) + len(gap)) // (cell + len(gap)), 1)
    panels = [
        "\n".join(f"{m}{gap.join(row[at : at + per_panel])}".rstrip() for m, row in zip(margin, rows))
        for at in range(0, max(map(len, rows)), per_panel)
    ]
    return "\n\n".join(panels)


def to_png(played: Played, path: str | Path, title: str = "") -> None:
    """Ranks as rows, time to the right, a box per action with its microbatch; chunks from dark to light."""
    from matplotlib.figure import Figure

    rows = len(played.timeline)
    boxes = max(len(spans) for spans in played.timeline)
    wide, high = min(max(9.0, 0.42 * boxes), 26.0), 1.65 + 0.46 * rows  # inches
    left, right = 0.75, 0.90
    figure = Figure(figsize=(wide, high), dpi=150, facecolor="white")
    axes = figure.add_axes((left / wide, 0.80 / high, 1 - (left + right) / wide, 1 - 1.50 / high))
    for rank, spans in enumerate(played.timeline):
        axes.broken_barh([(0, played.makespan)], (rank - 0.42, 0.84), facecolor=IDLE)
        _draw_row(axes, played, rank, spans, inches=(wide - left - right) / played.makespan)
        axes.text(played.makespan, rank, f"  holds {played.peak[rank]}", va="center", color=INK, fontsize=8)

    axes.set_xlim(0, played.makespan)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(rows), [f"rank {rank}" for rank in range(rows)], va="center")
    axes.set_xlabel("time", color=INK, fontsize=8)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    axes.spines[:].set_visible(False)
    held = _count(max(played.peak), "activation")
    measured = f"bubble {played.bubble:.1%} of the ideal time   ·   at most {held} held at once"
    figure.text(left / wide, 1 - 0.30 / high, title, fontsize=11, fontweight="bold", color=INK, va="center")
    figure.text(left / wide, 1 - 0.53 / high, measured, fontsize=8.5, color=INK, va="center")
    entries = _legend(played)
    figure.legend(
        handles=entries,
        ncols=len(entries),
        loc="lower left",
        bbox_to_anchor=((left - 0.05) / wide, 0.08 / high),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.4,
        borderaxespad=0,
    )
    figure.savefig(path, format="png")


def _draw_row(axes: Axes, played: Played, rank: int, spans: list[Span], inches: float) -> None:
    """`inches` per unit of time; a number that does not fit into its box is omitted."""
    bars = defaultdict(list)
    for action, start, end in spans:
        bars[_shade(played, action)].append((start, end - start))
        text = str(action.microbatch)
        if (end - start) * inches > 0.075 * len(text) + 0.03:
            light = _chunk(played, action) * 2 >= _chunks(played) > 1 or action.kind is Kind.WEIGHT
            ink = INK if light else "white"
            axes.text((start + end) / 2, rank, text, ha="center", va="center", fontsize=7, color=ink)
    for face, extents in bars.items():
        axes.broken_barh(extents, (rank - 0.42, 0.84), facecolor=face, edgecolor="white", linewidth=0.6)


def _legend(played: Played) -> list[Patch]:
    """Legend: each kind of action (with many chunks only the first and the last), and idle time."""
    from matplotlib.patches import Patch

    kinds = {span.action.kind for spans in played.timeline for span in spans}
    last = _chunks(played) - 1
    chunks = range(last + 1) if last < 4 else (0, last)
    shown = [Action(kind, chunk * len(played.timeline), 0) for kind in WORDS if kind in kinds for chunk in chunks]
    patches = [Patch(facecolor=_shade(played, action), label=_words(played, action)) for action in shown]
    return [*patches, Patch(facecolor=IDLE, label="idle")]


def _shade(played: Played, action: Action) -> tuple[float, float, float]:
    """Colour of an action, lighter for later chunks."""
    from matplotlib.colors import to_rgb

    white = 0.6 * _chunk(played, action) / max(_chunks(played) - 1, 1)
    red, green, blue = (part + (1 - part) * white for part in to_rgb(COLOURS[action.kind]))
    return red, green, blue


def _title(name: str, ranks: int, microbatches: int, chunks: int) -> str:
    shape = [_count(ranks, "rank"), _count(microbatches, "microbatch")]
    if chunks > 1:
        shape.append(f"{chunks} chunks per rank")
    return f"{SCHEDULES[name].title}: {', '.join(shape)}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _count(number: int, word: str) -> str:
    plural = "es" if word.endswith("ch") else "s"
    return f"{number} {word}{plural if number != 1 else ''}"


def _key(played: Played) -> str:
    kinds = {span.action.kind for spans in played.timeline for span in spans}
    words = [f"{kind.value} {text}" for kind, text in WORDS.items() if kind in kinds]
    return "key     " + ", ".join(words + (["a, b, … chunk"] if _chunks(played) > 1 else []))


def _words(played: Played, action: Action) -> str:
    return WORDS[action.kind] + (f", chunk {_chunk(played, action)}" if _chunks(played) > 1 else "")


def _label(played: Played, action: Action) -> str:
    label = f"{action.kind.value}{action.microbatch}"
    if _chunks(played) == 1:
        return label
    chunk = _chunk(played, action)
    return label + (chr(ord("a") + chunk) if _chunks(played) <= 26 else f".{chunk}")


def _chunk(played: Played, action: Action) -> int:
    return action.stage // len(played.timeline)


def _chunks(played: Played) -> int:
    return played.num_stages // len(played.timeline)
