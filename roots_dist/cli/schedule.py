"""`roots schedule`: a pipeline schedule as a picture, with its bubble and peak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def schedule(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="a value of parallel.schedule; any other word lists them")
    ],
    ranks: Annotated[int, typer.Option(min=1, help="pipeline ranks")],
    microbatches: Annotated[int, typer.Option(min=1, help="microbatches of a step")],
    chunks: Annotated[int, typer.Option(min=1, help="stages per rank")] = 1,
    png: Annotated[Path | None, typer.Option(help="write the picture here")] = None,
) -> None:
    """Draw a pipeline schedule, with its bubble and the activations that each rank holds.

    \b
    roots schedule zb-h1 --ranks 4 --microbatches 8
    """
    from roots_dist.schedule.draw import describe

    typer.echo(describe(name, ranks, microbatches, chunks, png))
