"""What a finished run says last: where it is, its curve, before and after, a continuation, what to try next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from roots_dist.config.schema import Config
from roots_dist.track.curve import draw_curve
from roots_dist.track.metrics import METRICS_FILE, read_lines

ROWS = (("validation loss", "loss/validation"), ("perplexity", "perplexity/validation"), ("bits per byte", "bits_per_byte/validation"))


def closing_lines(config: Config, folder: Path, continuation: tuple[str, str] | None) -> None:
    """To the terminal, on rank 0. The figures are read from the run's own record."""
    console = Console(highlight=False)
    curve = draw_curve(folder / METRICS_FILE, folder / "curve.png", title=folder.name)
    scores = [line for line in read_lines(folder / METRICS_FILE) if "loss/validation" in line]
    console.print()
    if scores:
        table = Table("", f"before (step {scores[0]['step']})", f"after (step {scores[-1]['step']})", box=None)
        for label, name in ROWS:
            if name in scores[0]:
                table.add_row(label, *(f"{line[name]:.3f}" if line[name] is not None else "-" for line in (scores[0], scores[-1])))
        console.print(table)
        console.print()
    if continuation:
        console.print(Text.assemble((continuation[0], "bold"), continuation[1]))
        console.print()
    console.print(f"run    {folder}", soft_wrap=True)
    console.print(f"curve  {curve}", soft_wrap=True)
    if config.data.tokenizer:
        console.print(f'next   roots generate {folder} "The people of the United States"', soft_wrap=True)
