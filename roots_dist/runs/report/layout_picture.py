"""Picture of a layout: which rank is where. Stages from left to right, replicas from top to bottom.

The tensor and context ranks of a stage and replica, which share every layer, are in one box; arrows show where
activations go.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from roots_dist.layout import Layout
from roots_dist.runs.report.charts import colour
from roots_dist.runs.report.markup import tag

CELL, GAP, LEFT, TOP = 44.0, 26.0, 46.0, 24.0
MOST = {"tp": 8, "pp": 12, "dp": 4}
"""Largest number of ranks drawn per axis; more get an ellipsis in the middle."""


def shown_ranks(number: int, most: int) -> list[int | None]:
    """All of 0 … number - 1, or the first and the last of them around None."""
    if number <= most:
        return list(range(number))
    return [*range(most // 2), None, *range(number - (most - 1) // 2, number)]


def layout_picture(layout: Layout) -> Element:
    stages, replicas = (shown_ranks(getattr(layout, axis), MOST[axis]) for axis in ("pp", "dp"))
    tensor = shown_ranks(layout.cp * layout.tp, MOST["tp"])
    box_height = CELL * 0.6 * len(tensor) + 8
    width = LEFT + len(stages) * (CELL + GAP + 8)
    height = TOP + len(replicas) * (box_height + 10)
    parts: list[Element] = []
    for column, stage in enumerate(stages):
        x = LEFT + column * (CELL + GAP + 8)
        words = "…" if stage is None else f"pp{stage}"
        parts.append(tag("text", words, x=x + CELL / 2 + 4, y=TOP - 9, text_anchor="middle", class_="dim"))
        for row, replica in enumerate(replicas):
            y = TOP + row * (box_height + 10)
            if column == 0:
                words = "…" if replica is None else f"dp{replica}"
                parts.append(tag("text", words, x=LEFT - 10, y=y + box_height / 2 + 4, text_anchor="end", class_="dim"))
            if column + 1 < len(stages) and replica is not None:
                parts.append(_arrow(x + CELL + 8, y + box_height / 2))
            if stage is not None and replica is not None:
                parts += _box(layout, stage, replica, tensor, x, y, box_height)
    return tag(
        "svg",
        tag("title", str(layout)),
        parts,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        style=f"max-width:{width:g}px",
    )


def _box(
    layout: Layout, stage: int, replica: int, tensor: Sequence[int | None], x: float, y: float, height: float
) -> list[Element]:
    parts = [tag("rect", x=x, y=y, width=CELL + 8, height=height, rx=5, class_=f"box stroke-{colour(replica)}")]
    for row, place in enumerate(tensor):
        top = y + 4 + row * CELL * 0.6
        if place is None:
            parts.append(tag("text", "⋮", x=x + 4 + CELL / 2, y=top + 17, text_anchor="middle", class_="dim"))
            continue
        cp, tp = divmod(place, layout.tp)
        rank = layout.rank(stage, replica, tp, cp)
        experts = f", experts {layout.along('ep', layout.place(rank)).index(rank)}" if layout.ep > 1 else ""
        about = tag("title", f"rank {rank}: {layout.place(rank)}{experts}")
        size = {"width": CELL, "height": CELL * 0.6 - 2, "rx": 3}
        parts.append(tag("rect", about, x=x + 4, y=top + 1, **size, class_=f"fill-{colour(replica)}"))
        parts.append(tag("text", str(rank), x=x + 4 + CELL / 2, y=top + 18, text_anchor="middle", class_="on"))
    return parts


def _arrow(x: float, y: float) -> Element:
    return tag("path", d=f"M{x + 4:g},{y:g}h{GAP - 9:g}m-4,-3.5l4.5,3.5l-4.5,3.5", class_="arrow")
