"""Tables and picture of docs/exact.md, made from what was measured and kept in docs/exact.json.

    pytest -m full tests/parity/test_exact.py -o junit_family=xunit1 --junitxml=digests.xml    # minutes to hours
    python docs/make_exact.py digests.xml ...     --> digests in docs/exact.json, and the page
    python benchmarks/exact.py messages steps curves --> the rest of it
    python docs/make_exact.py                     --> the page and docs/exact.png

tests/test_readme.py fails while the page does not say what the results say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

DOCS = Path(__file__).resolve().parent
PAGE, RESULTS, PICTURE = DOCS / "exact.md", DOCS / "exact.json", DOCS / "exact.png"
CASE = re.compile(r"test_no_bit_depends_on_any_layout\[([\w+-]+)-(fp32|bf16)-(\d+)-(\d+)(?:-(\d+))?(-eight stages)?\]")
COLOURS = ("#2f6db5", "#d9622b", "#2a8f68", "#9a4fb0", "#a87b00")
WIDTHS = (9.0, 7.0, 5.0, 3.2, 1.4)


def page() -> str:
    """The page with what is between its marks made anew."""
    found, text = results(), PAGE.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}: docs/make_exact.py -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + "\n" + "\n".join(make(found)) + "\n\n" + end + after
    return text


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def read_digests(files: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Group of layouts -> layout -> model and dtype -> digest, of the runs of which pytest reports."""
    found: dict[str, dict[str, dict[str, str]]] = results().get("digests", {})
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        match = CASE.match(case.get("name", ""))
        if match is None:
            continue
        model, dtype, tensor, data, context, deep = match.groups()
        degrees = f"tensor: {tensor}, data: {data}{f', context: {context}' if context else ''}"
        group = f"{{{degrees}}}{', eight stages' if deep else ''}"
        for row in case.iter("property"):
            cells = found.setdefault(group, {}).setdefault(str(row.get("name")), {})
            cells[f"{model} {dtype}"] = str(row.get("value"))
    return found


def _digests(found: dict[str, Any]) -> Iterator[str]:
    groups = found["digests"]
    columns = sorted({column for rows in groups.values() for cells in rows.values() for column in cells})
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for group, rows in groups.items():
        yield f"| **`{group}`** |" + " |" * len(columns)
        for layout, cells in rows.items():
            yield f"| {layout} | {' | '.join(f'`{cells[c]}`' if c in cells else '' for c in columns)} |"
    cells = [cell for rows in groups.values() for row in rows.values() for cell in row.items()]
    equal = all(len({row[c] for row in rows.values() if c in row}) <= 1 for rows in groups.values() for c in columns)
    yield ""
    yield f"{len(cells)} runs; {'all digests of a column and a pair of degrees are equal' if equal else 'SOME DIFFER'}."


def _messages(found: dict[str, Any]) -> Iterator[str]:
    yield "| ranks | bytes | all-reduce: gloo's | tree | ratio | reduce-scatter: gloo's | tree | ratio |"
    yield "|---" * 8 + "|"
    for ranks, rows in found["messages"].items():
        for size, reduce, tree, scatter, tree_scatter in rows:
            pairs = ((reduce, tree), (scatter, tree_scatter))
            told = [f"{1e3 * a:.2f} ms | {1e3 * b:.2f} ms | {b / a:.2f}" for a, b in pairs]
            yield f"| {ranks} | {int(size) >> 10} KiB | {' | '.join(told)} |"


def _steps(found: dict[str, Any]) -> Iterator[str]:
    yield "| | by the clock: without | with | ratio | of the processor: without | with | ratio |"
    yield "|---" * 7 + "|"
    for of, rows in found["steps"].items():
        yield f"| **{of}** |" + " |" * 6
        for name, times in rows.items():
            told = [f"{a:.2f} s | {b:.2f} s | {ratio:.2f}" for a, b, ratio in (times[:3], times[3:])]
            yield f"| {name} | {' | '.join(told)} |"


def _curves(found: dict[str, Any]) -> Iterator[str]:
    yield "| run | steps | digest of all losses and norms |"
    yield "|---|---|---|"
    for name, digest in found["curves"]["digests"].items():
        yield f"| {name} | {found['curves']['steps'][name]} | `{digest}` |"


PARTS = {"digests": _digests, "messages": _messages, "steps": _steps, "curves": _curves}
"""Marks in the page -> what makes the lines between them."""


def draw() -> None:
    """Curves over one another, widest first, so that each can be seen where all are equal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = results()["curves"]
    figure = Figure(figsize=(9.5, 3.6), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    steps = range(1, 1 + len(curves["values"]["one process"]))
    fixed = [name for name in curves["digests"] if not name.startswith("over ")]
    for name, colour, width in zip(fixed, COLOURS, WIDTHS[-len(fixed) :]):
        left.plot(steps, curves["values"][name], color=colour, linewidth=width, label=name)
    left.set_title(f"{len(fixed)} layouts, one curve", fontsize=10, loc="left")
    (growing,) = (name for name in curves["digests"] if name.startswith("over "))
    right.plot(steps, curves["values"][fixed[0]], color="#c9ced6", linewidth=7, label=f"{fixed[0]}, left alone")
    quarter = len(curves["values"]["one process"]) // len(curves["growing"])
    for number, (name, colour) in enumerate(zip(curves["growing"], COLOURS)):
        here = slice(number * quarter, (number + 1) * quarter + 1)
        right.plot(steps[here], curves["values"][growing][here], color=colour, linewidth=1.6, label=name)
    right.set_title(f"one run {growing}", fontsize=10, loc="left")
    for axis in (left, right):
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8, frameon=False)
    left.set_ylabel("training loss (nats)", fontsize=9)
    figure.savefig(PICTURE)


def main() -> None:
    if files := sys.argv[1:]:
        found = results() | {"digests": read_digests(files)}
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
