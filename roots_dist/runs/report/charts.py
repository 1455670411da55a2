"""Curves and bars as SVG: each picture is a function of numbers. Colours and fonts are those of the page (style.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree.ElementTree import Element

from roots_dist.runs.report.markup import tag
from roots_dist.runs.track.progress import short

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1000.0, 56.0, 16.0, 26.0, 28.0
"""Width of a full-width picture and its margins, in unscaled screen pixels."""
MOST_POINTS = 700
COLOURS = 8
FEW = 24
"""Number of points of a line up to which each has a marker: with fewer, a line alone hides how little it knows."""
MOST_CUTS = 40
"""Number of markers of cut values that are drawn for one line."""


@dataclass(frozen=True)
class Line:
    steps: Sequence[int]
    values: Sequence[float]
    colour: int = 0
    style: Literal["solid", "thin", "faint", "dots"] = "solid"
    name: str = ""


def colour(index: int) -> str:
    return f"c{index % COLOURS}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round tick values between two numbers, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= 0.999 * rough), 10 * power)
    return [
        round(i * step, 12 - math.floor(math.log10(step)))
        for i in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def downsample(line: Line) -> Iterator[tuple[int, float]]:
    """All points of a line; if there are many, the lowest and highest of each group of neighbours, so that spikes
    stay."""
    n = len(line.steps)
    points = list(zip(line.steps, line.values))
    if n <= MOST_POINTS:
        yield from points
        return
    per = math.ceil(2 * n / MOST_POINTS)
    for start in range(0, n, per):
        some = points[start : start + per]
        yield from sorted({min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])})


def line_chart(
    lines: Sequence[Line],
    label: str,
    *,
    window: tuple[float, float] | None = None,
    marks: Sequence[tuple[int, int]] = (),
    events: Sequence[tuple[int, str, int]] = (),
    unit: str = "",
    width: float = WIDTH,
    height: float = 300.0,
) -> Element:
    """Chart of values over steps. `window` is the lowest and highest value shown (default: from 0, or the lowest value,
    to the highest); a value beyond it is a triangle at the edge. `marks` are (step, colour) of steps without a value,
    `events` (step, words, colour) of what happened between two steps. `unit` is what is drawn upwards."""
    drawn = [line for line in lines if line.steps]
    if not drawn and not marks:
        return tag("p", f"{label}: nothing logged yet.", class_="dim")
    values = [value for line in drawn for value in line.values] or [0.0]
    low, high = window or (min(0.0, *values) if len(values) > 1 else min(0.0, values[0]), 1.06 * max(values))
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    first = min([line.steps[0] for line in drawn] + [step for step, _ in marks])
    last = max([line.steps[-1] for line in drawn] + [step for step, _ in marks])
    first, last = (first - 1, last + 1) if first == last else (first, last)
    inner_width, inner_height = width - LEFT - RIGHT, height - TOP - BOTTOM

    def x(step: float) -> float:
        return (step - first) / (last - first) * inner_width

    def y(value: float) -> float:
        return (high - value) / (high - low) * inner_height

    grid = [
        part
        for value in ticks(low, high)
        for part in (
            tag("line", x1=LEFT, x2=width - RIGHT, y1=TOP + y(value), y2=TOP + y(value), class_="grid"),
            tag("text", short(value), x=LEFT - 8, y=TOP + y(value) + 4, text_anchor="end"),
        )
    ]
    below = [
        tag("text", short(step), x=LEFT + x(step), y=height - 8, text_anchor="middle")
        for step in ticks(first, last, round(width / 110))
        if step == int(step)
    ]
    curves = [part for line in drawn for part in _curve(line, x, y)]
    cuts = [part for line in drawn if line.style != "faint" or window for part in _cuts(line, (low, high), x, y)]
    happened = [part for event in events for part in _event(event, LEFT + x(event[0]), width, height)]
    crosses = [
        tag("text", "×", x=x(step), y=inner_height - 3, text_anchor="middle", class_=f"cross fill-{colour(index)}")
        for step, index in marks[:: math.ceil(len(marks) / 200) or 1]
    ]
    return tag(
        "svg",
        tag("title", label),
        grid,
        below,
        tag("text", "step", x=LEFT - 22, y=height - 8, text_anchor="end", class_="dim"),
        tag("text", unit, x=2, y=12, class_="dim") if unit else None,
        happened,
        tag(
            "svg", curves, crosses, cuts, x=LEFT, y=TOP, width=inner_width, height=inner_height
        ),  # the inner svg clips the curves
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
    )


def _curve(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[Element]:
    points = [(x(step), y(value)) for step, value in downsample(line)]
    if len(points) > 1:
        path = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points)
        yield tag("path", d=path, class_=f"line {line.style} {colour(line.colour)}")
    if line.style == "dots" or (len(points) <= FEW and line.style != "faint"):
        for px, py in points if len(points) <= 60 else points[-1:]:
            yield tag("circle", cx=px, cy=py, r=3.2, class_=f"fill-{colour(line.colour)} dot")


def _cuts(
    line: Line, limits: tuple[float, float], x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[Element]:
    """Triangles at the edge where the line leaves the picture, with the value to read."""
    low, high = limits
    outside = [(step, value) for step, value in downsample(line) if not low <= value <= high]
    for step, value in outside[:: math.ceil(len(outside) / MOST_CUTS) or 1]:
        up = value > high
        px, py, tip = x(step), y(high if up else low), 9 if up else -9
        path = f"M{px - 5:.1f},{py + tip:.1f}L{px + 5:.1f},{py + tip:.1f}L{px:.1f},{py:.1f}Z"
        yield tag("path", tag("title", f"step {step}: {value:.4g}"), d=path, class_=f"fill-{colour(line.colour)}")


def _event(event: tuple[int, str, int], x: float, width: float, height: float) -> Iterator[Element]:
    """A line from top to bottom with its words above the picture."""
    _, words, index = event
    right = x > 0.6 * width
    yield tag("path", d=f"M{x:.1f},{TOP - 14:.1f}L{x:.1f},{height - BOTTOM:.1f}", class_=f"event {colour(index)}")
    yield tag("text", words, x=x + (-5 if right else 5), y=TOP - 6, text_anchor="end" if right else None, class_="dim")


def legend(entries: Sequence[tuple[str, int]]) -> Element:
    return tag(
        "p", [tag("span", tag("i", class_=f"key back-{colour(i)}"), name) for name, i in entries], class_="legend"
    )


def bar_chart(rows: Sequence[tuple[str, Sequence[tuple[str, float, int]], str]]) -> Element:
    """Stacked bars of equal length: (name, [(part, amount, colour)], total as text)."""
    left, right, step = 190.0, 84.0, 34.0
    room = WIDTH - left - right
    drawn: list[Element] = []
    for row, (name, parts, amount) in enumerate(rows):
        top, at, total = row * step, left, sum(part[1] for part in parts)
        drawn.append(tag("text", _cut(name, 28), tag("title", name), x=left - 10, y=top + 18, text_anchor="end"))
        for part, value, index in parts:
            width = value / total * room
            share = f"{value / total:.0%}"
            about = tag("title", f"{part}: {share}")
            drawn.append(tag("rect", about, x=at, y=top + 3, width=width, height=22, class_=f"fill-{colour(index)}"))
            if width > 34:
                drawn.append(tag("text", share, x=at + width / 2, y=top + 18, text_anchor="middle", class_="on"))
            at += width
        drawn.append(tag("text", amount, x=WIDTH - right + 10, y=top + 18))
    return tag("svg", drawn, viewBox=f"0 0 {WIDTH:g} {step * len(rows):g}", role="img")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
