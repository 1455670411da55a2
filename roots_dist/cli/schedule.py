"""`roots schedule`: a pipeline schedule as a picture, with its bubble and peak."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from roots_dist.cli.options import with_options


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The shape of the pipeline, and where its picture goes."""

    ranks: Annotated[int, typer.Option(min=1, help="pipeline ranks")]
    microbatches: Annotated[int, typer.Option(min=1, help="microbatches of a step")]
    virtual_stages: Annotated[int, typer.Option(min=1, help="stages per rank")] = 1
    png: Annotated[Path | None, typer.Option(help="write the picture here")] = None


@with_options
def schedule(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="a value of parallel.schedule; any other word lists them")
    ],
    options: ScheduleOptions,
) -> None:
    """Draw a pipeline schedule, with its bubble and the activations that each rank holds.

    \b
    roots schedule zb-h1 --ranks 4 --microbatches 8
    """
    from roots_dist.cli.terminal import busy
    from roots_dist.schedule.draw import describe

    with busy("playing the schedule"):
        drawn = describe(name, options.ranks, options.microbatches, options.virtual_stages, options.png)
    typer.echo(drawn)
