"""Draw docs/axes.svg: of each axis what one of two ranks holds, and what it sends.

python docs/make_axes.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).parent / "axes.svg"
COLUMNS = ("samples", "positions", "channels", "layers", "experts", "optimizer")
ALL = (True,) * 4
HALF, ENDS = (True, True, False, False), (True, False, False, True)


class Axis(NamedTuple):
    key: str
    name: str
    held: dict[str, tuple[bool, ...]]
    """Column -> which of its four parts the first of two ranks holds; all, if it is not named."""
    sends: str


AXES = (
    Axis("tp", "tensor", {"channels": HALF}, "in each layer two sums of activations, each way"),
    Axis("+ sp", "sequence, beside norms", {"positions": HALF}, "the same bytes, as gathers and scatters of sums"),
    Axis("cp", "context", {"positions": ENDS}, "in each layer keys and values, or heads for positions"),
    Axis(
        "ep",
        "expert, of dp × cp",
        {"samples": HALF, "experts": HALF},
        "in each layer tokens to their experts, and back",
    ),
    Axis("pp", "pipeline", {"layers": HALF}, "for each microbatch activations at a border of stages"),
    Axis("dp", "data", {"samples": HALF}, "once in a step gradients"),
    Axis("ZeRO-1", "over dp × cp", {"samples": HALF, "optimizer": HALF}, "gradients as a scatter, weights as a gather"),
)
FONTS = "-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif"
WIDTH, LEFT, TOP, ROW, COLUMN, CELL = 1180, 190, 92, 44, 106, 22
STYLE = """
    .card { fill: #fbfaf7; stroke: #d8d3c8 }
    .floor { fill: #efece4 }
    .held { fill: #2f6db5; stroke: #ffffff }
    .other { fill: #ffffff; stroke: #cfc8b8 }
    .title { font-size: 19px; font-weight: 700; fill: #22313f }
    .key { font-size: 14px; font-weight: 700; fill: #22313f }
    .what { font-size: 11.5px; fill: #5d6670 }
    .column { font-size: 12px; font-weight: 600; fill: #22313f }
"""


def picture() -> str:
    height = TOP + ROW * len(AXES) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"',
        f' role="img" aria-labelledby="title" font-family="{FONTS}">',
        '<title id="title">What one of two ranks of each axis holds, and what it sends</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="14"/>',
        '<text class="title" x="24" y="36">What the first of two ranks holds (blue), and what it sends</text>',
    ]
    for number, name in enumerate((*COLUMNS, "sends")):
        parts.append(f'<text class="column" x="{LEFT + number * COLUMN}" y="{TOP - 14}">{escape(name)}</text>')
    for row, axis in enumerate(AXES):
        y = TOP + row * ROW
        parts += [
            f'<rect class="floor" x="16" y="{y}" width="{WIDTH - 32}" height="{ROW - 6}" rx="8"/>',
            f'<text class="key" x="28" y="{y + 17}">{escape(axis.key)}</text>',
            f'<text class="what" x="28" y="{y + 31}">{escape(axis.name)}</text>',
            f'<text class="what" x="{LEFT + len(COLUMNS) * COLUMN}" y="{y + 23}">{escape(axis.sends)}</text>',
        ]
        for number, name in enumerate(COLUMNS):
            for part, held in enumerate(axis.held.get(name, ALL)):
                x = LEFT + number * COLUMN + part * CELL
                kind = "held" if held else "other"
                parts.append(f'<rect class="{kind}" x="{x}" y="{y + 9}" width="{CELL}" height="20" rx="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
