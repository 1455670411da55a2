"""`roots doctor` on the command line: its options. Imports nothing heavy; the work starts in
runs/doctor/run_doctor.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roots_dist.cli.arguments import Overrides


def doctor(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="YAML file whose layout and folder are checked", show_default=False),
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
        typer.Option(
            help="write the cluster profile, with everything measured, here", metavar="FILE", show_default=False
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="folder that all hosts share [default: the config's track.folder]",
            metavar="SHARED",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer sizes, shorter measurements")] = False,
    wait: Annotated[float, typer.Option(min=1, help="seconds to wait for ranks to start", metavar="SECONDS")] = 20.0,
) -> None:
    """Check a cluster before training: versions, clocks, free space, shared folder, speed per rank, links, placement.

    Without a launcher it starts processes here; under torchrun, deepspeed, mpirun or srun it is one of theirs. A check
    that hangs is given up and named.

    Exit code 1 if something would break or slow training, 2 if the ranks could not connect.

    \b
    roots doctor --processes 4 --quick
    srun --ntasks 16 python -m roots_dist doctor configs/bloom-560m.yaml --folder /shared/runs --json cluster.json
    """
    from roots_dist.runs.doctor.run_doctor import DoctorOptions, run_doctor

    options = DoctorOptions(config, tuple(overrides or ()), folder, quick, json, wait, context.obj)
    raise typer.Exit(run_doctor(options, processes))
