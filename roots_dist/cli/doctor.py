"""`roots doctor`: check a cluster before training."""

from __future__ import annotations

from typing import Annotated

import typer

from roots_dist.cli.arguments import Overrides
from roots_dist.cli.options import with_options
from roots_dist.runs.doctor.options import DoctorOptions


@with_options
def doctor(
    context: typer.Context,
    options: DoctorOptions,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="YAML file whose layout and folder are checked", show_default=False),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check a cluster before training: versions, clocks, free space, shared folder, speed per rank, links, placement.

    Without a launcher it starts processes here; under torchrun, deepspeed, mpirun or srun it is one of theirs. A check
    that hangs is given up and named.

    Exit code 1 if something would break or slow training, 2 if the ranks could not connect.

    \b
    roots doctor --processes 4 --quick
    srun --ntasks 16 python -m roots_dist doctor configs/bloom-560m.yaml \\
        --folder /shared/runs --json cluster.json
    """
    from roots_dist.runs.doctor.run_doctor import DoctorCommand, run_doctor

    raise typer.Exit(run_doctor(DoctorCommand(config, tuple(overrides or ()), options, context.obj)))
