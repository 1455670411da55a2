"""What a finished run says last: before and after, where it is, its curve, what to try next."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from roots_dist.config.schema import Config
from roots_dist.track.curve import draw_curve
from roots_dist.track.metrics import METRICS_FILE, read_lines

ROWS = (
    ("validation loss", "loss/validation"),
    ("perplexity", "perplexity/validation"),
    ("bits per byte", "bits_per_byte/validation"),
)


def closing_lines(config: Config, folder: Path) -> None:
    """To the terminal, on rank 0. The figures are read from the run's own record."""
    console = Console(highlight=False, soft_wrap=True)
    curve = draw_curve(folder / METRICS_FILE, folder / "curve.png", title=folder.name)
    scores = [line for line in read_lines(folder / METRICS_FILE) if "loss/validation" in line]
    console.print()
    if scores:
        first, last = scores[0], scores[-1]
        table = Table("", f"before (step {first['step']})", f"after (step {last['step']})", box=None, pad_edge=False)
        for label, name in ROWS:
            if name in first:
                table.add_row(label, *("-" if line.get(name) is None else f"{line[name]:.3f}" for line in (first, last)))
        console.print(table)
        console.print()
    console.print(f"run    {folder}")
    console.print(f"curve  {curve}")
    roots = command()
    if config.data.tokenizer:
        console.print(f'next   {roots} generate {folder} "The people of the United States"')
        console.print(f"       {roots} verify {folder / 'config.yaml'}")
    else:
        console.print(f"next   {roots} verify {folder / 'config.yaml'}")


def command() -> str:
    """How `roots` is called here: by its name where a shell finds it, else by the way to this Python's."""
    if shutil.which("roots"):
        return "roots"
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    beside = python.with_name("roots")
    return str(beside) if beside.exists() else f"{python} -m roots_dist"
