"""Picture of the load of experts: a row for each layer, a cell for each expert, the darker the more tokens it got."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from roots_dist.runs.report.markup import tag

WIDTH, LEFT, ROW = 640.0, 76.0, 16.0
MOST = 3.0
"""Multiple of the mean that is darkest."""
LIGHTEST = 0.04

Loads = Mapping[str, Sequence[int]]


def loads_of(text: object) -> Loads:
    """The counts of a record; none if it is no such record."""
    try:
        found = json.loads(str(text))
    except ValueError:
        return {}
    fits = isinstance(found, dict) and all(
        isinstance(counts, list) and counts and all(type(count) is int and count >= 0 for count in counts)
        for counts in found.values()
    )
    return found if fits else {}


def load_picture(loads: Loads) -> Element:
    """loads: tokens of each expert, by layer."""
    parts: list[Element] = []
    for row, (layer, counts) in enumerate(loads.items()):
        top, cell, mean = row * ROW, (WIDTH - LEFT) / len(counts), sum(counts) / len(counts)
        parts.append(tag("text", layer, x=LEFT - 8, y=top + ROW - 4, text_anchor="end", class_="dim"))
        for number, count in enumerate(counts):
            share = count / mean if mean else 0.0
            about = tag("title", f"{layer}, expert {number}: {count:,} tokens, {share:.2f} of the mean")
            shade = max(LIGHTEST, min(1.0, share / MOST))
            place = {"x": LEFT + number * cell, "y": top + 1, "width": max(cell - 1, 0.6 * cell), "height": ROW - 2}
            parts.append(tag("rect", about, **place, fill_opacity=f"{shade:.2f}", class_="fill-c0"))
    return tag(
        "svg",
        tag("title", "tokens of each expert"),
        parts,
        viewBox=f"0 0 {WIDTH:g} {ROW * len(loads):g}",
        role="img",
        style=f"max-width:{WIDTH:g}px",
    )
