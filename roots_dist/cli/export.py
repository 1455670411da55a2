"""`roots export`: a run to a folder of Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roots_dist.cli.arguments import Run


def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="new folder for the model")],
    dtype: Annotated[str, typer.Option(help="of the tensors: float32 or bfloat16", metavar="NAME")] = "float32",
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="compare logits with transformers' [default: where it is installed, below 1e9 parameters]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a run's model as transformers (4.57 and 5) and what reads its files want it, in one process.

    Exit code 1 if the logits of the new files are not the run's.

    \b
    roots export runs/quickstart exports/quickstart
    """
    from roots_dist.storage.exchange.exporting import checked, export_model, is_checked

    typer.echo(export_model(run, folder, dtype))
    if check or (check is None and is_checked(run)):
        said, equal = checked(run, folder, dtype)
        typer.echo(said)
        raise typer.Exit(0 if equal else 1)
