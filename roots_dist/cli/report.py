"""`roots report`: folders of runs -> one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="folders of runs (track.folder of their configs)")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="HTML file [default: report.html in the run's folder; here for several runs]", show_default=False
        ),
    ] = None,
) -> None:
    """Write a page about one run or several: curves, layout, time by part, validation, samples, differences.

    The page is one file without scripts. A run that is still active is shown up to now.

    \b
    roots report runs/quickstart
    roots report runs/a runs/b --output a-and-b.html
    """
    from roots_dist.cli.terminal import busy
    from roots_dist.files import write_output
    from roots_dist.runs.report.page import page
    from roots_dist.runs.report.run_record import read_runs
    from roots_dist.scrub import known_secrets

    path = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    with busy("reading the runs"):
        written = page(read_runs(runs, known_secrets()))
    write_output("--output", path, written)
    typer.echo(path)
