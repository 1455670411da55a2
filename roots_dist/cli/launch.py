"""`roots launch` on the command line: its options, nothing heavy.

command line --JobOptions--> job.py --> launchers.py --> submit.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides
from roots_dist.cli.finetune import FINETUNE
from roots_dist.cli.options import with_options
from roots_dist.cli.train import TRAIN
from roots_dist.runs.launch.options import (
    DeepSpeedOptions,
    KubernetesOptions,
    MpiOptions,
    SlurmOptions,
    TorchrunOptions,
)
from roots_dist.runs.ranks.command import Command

if TYPE_CHECKING:
    from roots_dist.config.schema import Config


def command_for(config: Config) -> Command:
    return FINETUNE if config.finetune.init_from is not None else TRAIN


@with_options
def launch(
    config: ConfigArgument,
    overrides: Overrides = None,
    on: Annotated[
        str, typer.Option(metavar="LAUNCHER", help="torchrun, deepspeed, slurm, mpi or kubernetes")
    ] = "torchrun",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show everything, write and start nothing")] = False,
    *,
    torchrun: TorchrunOptions,
    deepspeed: DeepSpeedOptions,
    slurm: SlurmOptions,
    mpi: MpiOptions,
    kubernetes: KubernetesOptions,
) -> None:
    """Start a config on a cluster: check it, show what is run and where the logs will be, and run it.

    A config with finetune.init_from is fine-tuned, another one trained. What is run is a script or manifest as in
    launch/, with its settings filled in; it is kept in the run's folder under launch/. The same command resumes from
    the newest checkpoint.

    \b
    roots launch configs/quickstart.yaml --on slurm --nodes 2 \\
        --time 02:00:00 --dry-run
    roots launch configs/gpt2-small.yaml --on deepspeed \\
        --hostfile hosts --exclude node7
    """
    from roots_dist import environment
    from roots_dist.runs.launch.check_options import choose
    from roots_dist.runs.launch.job import make
    from roots_dist.runs.launch.launchers import LAUNCHERS
    from roots_dist.runs.launch.submit import begin, shown, write

    options = choose(on, (torchrun, deepspeed, slurm, mpi, kubernetes))
    job = make(command_for, config, overrides or (), options, Path.cwd())
    plan = LAUNCHERS[on](job, environment.all_variables())
    for line in shown(job, plan, whole=dry_run):
        typer.echo(line)
    if not dry_run:
        write(plan)
        begin(plan)
