"""Arguments that several commands share. Imports nothing heavy, because `roots --help` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as those in configs/")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value ...]", help="override values of the file: optim.lr=1e-3", show_default=False
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, max=1 << 24, help="processes to start here (default: tp × cp × pp, or one per GPU)", show_default=False
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run (track.folder of its config)")]
