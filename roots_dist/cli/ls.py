"""`roots ls`: the runs in a folder, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ls(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of runs, or of one")] = Path("runs"),
) -> None:
    """List runs: model, layout, step, last loss of training and of validation, age, size, and whether it is running.

    `3.142@80` is the loss after step 80, where that is not the run's last step.

    Exit code 1 if a run's files cannot be read: the others are listed all the same.

    \b
    roots ls
    roots ls /shared/runs
    """
    import shutil

    from roots_dist.cli.terminal import busy
    from roots_dist.errors import Problem, UserError
    from roots_dist.files import where
    from roots_dist.runs.report.run_list import find_runs, list_runs
    from roots_dist.scrub import known_secrets

    if not folder.is_dir():
        expected = "a folder, and this is a file" if folder.exists() else f"a folder: there is no {where(folder)}"
        fix = "name the folder of your runs"
        raise UserError(Problem(key="FOLDER", found=str(folder), expected=expected, fix=fix))
    with busy(f"reading the runs in {folder}"):
        found = find_runs(folder)
        listed = list_runs(found, known_secrets(), shutil.get_terminal_size((120, 24)).columns) if found else None
    if listed is None:
        typer.echo(f"no runs in {folder}")
        return
    typer.echo("\n".join(listed.lines))
    if listed.unreadable:
        typer.echo("\n".join(listed.unreadable), err=True)
        raise typer.Exit(1)
