"""Draw docs/house.svg: the floors and rooms of the package as tests/test_architecture.py lists them, and a token's way.

python docs/make_house.py
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
PICTURE = DOCS / "house.svg"
ROOMS = {
    "errors": "four parts",
    "files": "written whole",
    "idx_format": "corpus header",
    "failures": "rank reports",
    "environment": "launcher variables",
    "slurm": "its lists",
    "scrub": "hides secrets",
    "layout": "who is where",
    "logs": "from rank 0",
    "cluster_profile": "from doctor",
    "schedule": "pipeline programs, played and drawn",
    "config": "the typed tree of a run",
    "accounting": "parameters, FLOPs, memory, bounds",
    "checks": "every rule between keys, at once",
    "world": "mesh, axes, shard specs, keyed randomness, microbatches",
    "parallel.optim": "AdamW's groups, rates",
    "parallel.tensor": "column, row, vocabulary",
    "parallel.pipeline": "stages and the executor",
    "parallel.zero": "the seam to DeepSpeed",
    "learning.models": "pieces: block, heads, families",
    "learning.data": "text to ids to microbatches",
    "learning.objectives": "what is learned, as sums and counts",
    "assembly": "RankModel, Passes, Run: what one rank runs",
    "storage.checkpoint": "any layout to any layout",
    "storage.exchange": "to and from Hugging Face",
    "runs.ranks": "start, join",
    "runs.track": "metrics, W&B",
    "runs.generate": "write, chat",
    "runs.evaluate": "held-out loss",
    "runs.train": "loop and step",
    "runs.launch": "cluster jobs",
    "runs.doctor": "cluster checks",
    "runs.plan": "predictions",
    "runs.report": "one page",
    "testing": "worlds of real ranks, parity",
    "verify": "this config's proof",
    "cli": "one file for each command, with its options beside it",
    "api": "load, train, be called back",
    "__main__": "python -m",
}
"""Room -> what it is for. A room without a line here cannot be drawn, and the test says so."""
WAY = (
    ("learning.data", "prepare.py"),
    ("learning.data", "batches.py"),
    ("runs.train", "step.py"),
    ("parallel.pipeline", "executor.py"),
    ("learning.models", "block.py"),
    ("parallel.tensor", "linear.py"),
    ("parallel.tensor", "cross_entropy.py"),
)
"""The files through which a token goes, in the order of the calls."""

FONTS = "-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif"
WIDTH, LEFT, TOP, BAND, GAP, ROOM = 1180, 176, 58, 62, 8, 46
STYLE = """
    .card { fill: #fbfaf7; stroke: #d8d3c8 }
    .floor { fill: #efece4 }
    .room { fill: #ffffff; stroke: #cfc8b8 }
    .name { font-size: 13.5px; font-weight: 600; fill: #22313f }
    .what { font-size: 10.5px; fill: #5d6670 }
    .level { font-size: 13px; font-weight: 600; fill: #22313f }
    .stop { fill: #2f6db5; stroke: #ffffff; stroke-width: 1.5 }
    .number { font-size: 11.5px; font-weight: 700; fill: #ffffff; text-anchor: middle }
    .way { font-size: 12px; fill: #2f6db5; font-family: ui-monospace, Menlo, DejaVu Sans Mono, monospace }
    .title { font-size: 19px; font-weight: 700; fill: #22313f }
"""


def floors() -> list[tuple[str, tuple[str, ...]]]:
    """FLOORS of the architecture test, lowest first, without importing it."""
    tree = ast.parse((DOCS.parent / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return list(ast.literal_eval(assigned["FLOORS"]))


def picture() -> str:
    rows = list(reversed(floors()))
    height = TOP + len(rows) * (BAND + GAP) + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"',
        f' role="img" aria-labelledby="title" font-family="{FONTS}">',
        '<title id="title">The floors and rooms of roots_dist, and the way of a token through seven files</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="14"/>',
        '<text class="title" x="24" y="36">A room imports only from rooms below it, and from those to its left</text>',
    ]
    for index, (title, rooms) in enumerate(rows):
        y = TOP + index * (BAND + GAP)
        parts.append(f'<rect class="floor" x="16" y="{y}" width="{WIDTH - 32}" height="{BAND}" rx="8"/>')
        parts += [
            f'<text class="level" x="28" y="{y + 26 + 16 * line}">{escape(text)}</text>'
            for line, text in enumerate(_lines(title))
        ]
        parts += _rooms(rooms, y + (BAND - ROOM) // 2)
    parts += _legend(height - 40)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lines(title: str) -> list[str]:
    """A title of a floor in at most two lines."""
    words = title.split()
    half = (len(words) + 1) // 2
    return [title] if len(title) < 18 else [" ".join(words[:half]), " ".join(words[half:])]


def _rooms(rooms: tuple[str, ...], y: int) -> list[str]:
    """Boxes as wide as their words need, stretched to fill the floor."""
    needed = [max(8.4 * len(_name(room)), 6.0 * len(ROOMS[room])) + 22 for room in rooms]
    space = WIDTH - 24 - LEFT - GAP * (len(rooms) - 1)
    spare, parts, x = (space - sum(needed)) / len(rooms), [], float(LEFT)
    for room, least in zip(rooms, needed):
        width = least + spare
        parts.append(f'<rect class="room" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{ROOM}" rx="6"/>')
        parts.append(f'<text class="name" x="{x + 9:.0f}" y="{y + 19}">{escape(_name(room))}</text>')
        parts.append(f'<text class="what" x="{x + 9:.0f}" y="{y + 36}">{escape(ROOMS[room])}</text>')
        stops = [number for number, (where, _) in enumerate(WAY, 1) if where == room]
        for place, number in enumerate(reversed(stops)):
            at = x + width - 13 - 21 * place
            parts.append(f'<circle class="stop" cx="{at:.0f}" cy="{y + 2}" r="9.5"/>')
            parts.append(f'<text class="number" x="{at:.0f}" y="{y + 6}">{number}</text>')
        x += width + GAP
    return parts


def _name(room: str) -> str:
    return room.rpartition(".")[2]


def _legend(y: int) -> list[str]:
    """The seven files, in two lines."""
    stops = [f"{number} {room.replace('.', '/')}/{file}" for number, (room, file) in enumerate(WAY, 1)]
    return [
        f'<text class="level" x="28" y="{y + 8}">a token</text>',
        f'<text class="way" x="{LEFT}" y="{y}">{escape("   →   ".join(stops[:4]))}   →</text>',
        f'<text class="way" x="{LEFT}" y="{y + 20}">{escape("   →   ".join(stops[4:]))}   and the same way back</text>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
