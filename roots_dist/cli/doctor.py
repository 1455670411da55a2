"""`roots doctor` on the command line: its options, nothing heavy. The work begins in start.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roots_dist.cli.arguments import Overrides


def doctor(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="YAML file: its layout is placed, its folder tried", show_default=False),
    ] = None,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="processes to start here [default: tp × pp, or one per GPU, or 2]", show_default=False
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="write everything measured here: the cluster profile", metavar="FILE", show_default=False),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="that all hosts share [default: the config's track.folder]", metavar="SHARED", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer sizes, shorter measurements")] = False,
    wait: Annotated[float, typer.Option(min=1, help="seconds that ranks may take to arrive", metavar="SECONDS")] = 20.0,
) -> None:
    """Check a cluster before training: versions, clocks, room, the shared folder, speed of each rank, links, placement.

    Bare, it starts processes here; torchrun, deepspeed, mpirun or srun it joins. A check that hangs is given up and
    named. Exit code 1 if something would keep training from running well, 2 if the ranks could not even meet.

    \b
    roots doctor --processes 4 --quick
    srun --ntasks 16 python -m roots_dist doctor configs/bloom-560m.yaml --folder /shared/runs --json cluster.json
    """
    from roots_dist.runs.doctor.run_doctor import DoctorOptions, run_doctor

    options = DoctorOptions(config, tuple(overrides or ()), folder, quick, json, wait, context.obj)
    raise typer.Exit(run_doctor(options, processes))
