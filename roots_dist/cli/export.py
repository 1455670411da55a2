"""`roots export`: a run -> a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from roots_dist.cli.arguments import Overrides, Run
from roots_dist.cli.options import with_options


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of the written tensors and their check."""

    dtype: Annotated[str, typer.Option(help="data type of the tensors: float32 or bfloat16", metavar="NAME")] = (
        "float32"
    )
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="compare logits with transformers' [default: if installed and below 1e9 parameters]",
            show_default=False,
        ),
    ] = None


@with_options
def export(
    run: Run,
    options: ExportOptions,
    folder: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="new folder for the model")],
    overrides: Overrides = None,
) -> None:
    """Write a run's model in the format of transformers (4.57 and 5), in one process.

    Exit code 1 if the logits of the written files differ from the run's. The only override is advanced.extensions,
    which a run needs that was trained with a file of one's own.

    \b
    roots export runs/quickstart exports/quickstart
    """
    from roots_dist.cli.terminal import busy
    from roots_dist.storage.exchange.exporting import checked, export_model, why_unchecked

    with busy(f"exporting {run}"):
        done = export_model(run, folder, options.dtype, overrides or ())
    typer.echo(done)
    unchecked = why_unchecked(run, overrides or ()) if options.check is None else None
    if unchecked is not None:
        typer.echo(f"logits: not compared with the run's, because {unchecked}")
    elif options.check is not False:
        with busy("comparing its logits with transformers'"):
            message, equal = checked(run, folder, options.dtype, overrides or ())
        typer.echo(message)
        raise typer.Exit(0 if equal else 1)
