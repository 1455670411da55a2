"""The options of `roots doctor`. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="processes to start here [default: tp × cp × pp, or one per GPU, or 2]", show_default=False
        ),
    ] = None
    json: Annotated[
        Path | None,
        typer.Option(
            help="write the cluster profile, with everything measured, here", metavar="FILE", show_default=False
        ),
    ] = None
    folder: Annotated[
        Path | None,
        typer.Option(
            help="folder that all hosts share [default: the config's track.folder]",
            metavar="SHARED",
            show_default=False,
        ),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="fewer sizes, shorter measurements")] = False
    wait: Annotated[float, typer.Option(min=1, help="seconds to wait for ranks to start", metavar="SECONDS")] = 20.0
