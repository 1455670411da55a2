"""`roots launch` on the command line: its options, nothing heavy.

command line --Wishes--> job.py --> launchers.py --> submit.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides
from roots_dist.cli.finetune import FINETUNE
from roots_dist.cli.train import TRAIN
from roots_dist.runs.ranks.verb import Verb

if TYPE_CHECKING:
    from roots_dist.config.schema import Config


def verb_for(config: Config) -> Verb:
    return FINETUNE if config.finetune.init_from is not None else TRAIN


def launch(
    config: ConfigArgument,
    overrides: Overrides = None,
    on: Annotated[
        str, typer.Option(help="torchrun, deepspeed, slurm, mpi or kubernetes", metavar="LAUNCHER")
    ] = "torchrun",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="machines [default: 1, or those of the hostfile]", show_default=False)
    ] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="on each [default: what is left of tp × pp]", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="the same, and ask for as many GPUs", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show all of it, write and begin nothing")] = False,
    name: Annotated[str | None, typer.Option(help="of the job [default: the config's]", show_default=False)] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="variable for every rank; again for more", metavar="NAME=VALUE", show_default=False),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="of ranks that fail, from the newest checkpoint (torchrun)")
    ] = 0,
    grace: Annotated[int, typer.Option(min=1, help="seconds for a step and a checkpoint, once told to stop")] = 120,
    meet: Annotated[
        str | None, typer.Option(help="torchrun: where the nodes meet", metavar="HOST:PORT", show_default=False)
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="deepspeed, mpi: lines of HOST slots=N", metavar="FILE", show_default=False)
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="of its hosts these, or some slots", metavar="a@b:0,1", show_default=False)
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="of its hosts all but these", metavar="a@b:0,1", show_default=False)
    ] = None,
    runner: Annotated[
        str | None,
        typer.Option(help="deepspeed: pdsh or openmpi; mpi: openmpi or mpich", metavar="NAME", show_default=False),
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="slurm: limit of one job", metavar="HH:MM:SS", show_default=False)
    ] = None,
    partition: Annotated[str | None, typer.Option(help="slurm", metavar="NAME", show_default=False)] = None,
    account: Annotated[str | None, typer.Option(help="slurm", metavar="NAME", show_default=False)] = None,
    array: Annotated[
        int | None, typer.Option(min=1, help="slurm: so many jobs, one after another", show_default=False)
    ] = None,
    spare: Annotated[
        int, typer.Option(min=0, help="slurm: more nodes, each examined first; the sick are left out")
    ] = 0,
    image: Annotated[
        str | None, typer.Option(help="kubernetes: with roots in it", metavar="NAME", show_default=False)
    ] = None,
    claim: Annotated[
        str | None, typer.Option(help="kubernetes: the volume for data and runs", metavar="NAME", show_default=False)
    ] = None,
    namespace: Annotated[str, typer.Option(help="kubernetes", metavar="NAME")] = "default",
    kind: Annotated[
        str, typer.Option(help="kubernetes: job (Indexed Job) or trainjob (Kubeflow)", metavar="NAME")
    ] = "job",
    python: Annotated[
        str | None,
        typer.Option(
            help="on the nodes [default: this one; kubernetes: the image's]", metavar="PATH", show_default=False
        ),
    ] = None,
    program: Annotated[
        str | None, typer.Option(help="instead of sbatch, mpirun or kubectl", metavar="PATH", show_default=False)
    ] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(help="one more argument for it; again for more", metavar="WORD", show_default=False),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="slurm, kubernetes: a site's own form", metavar="FILE", show_default=False)
    ] = None,
) -> None:
    """Start a config on a cluster with the launcher that is there: check it, show what is run and where logs will be, run it.

    A config that starts from a model (finetune.init_from) is fine-tuned, another one trained. The same command goes on from the
    newest checkpoint. Scripts and manifests are kept in the run's folder, under launch/.

    \b
    roots launch configs/quickstart.yaml --on slurm --nodes 2 --time 02:00:00 --dry-run
    roots launch configs/gpt2-small.yaml --on deepspeed --hostfile hosts --exclude node7
    """
    from roots_dist import environment
    from roots_dist.runs.launch.job import Wishes, make
    from roots_dist.runs.launch.launchers import LAUNCHERS
    from roots_dist.runs.launch.quoting import refused
    from roots_dist.runs.launch.submit import begin, shown, write

    if on not in LAUNCHERS:
        raise refused("--on", on, ", ".join(LAUNCHERS), "choose one of them")
    if gpus_per_node is not None and processes_per_node is not None:
        raise refused(
            "--gpus-per-node", gpus_per_node, "nothing beside --processes-per-node", "leave out one of the two"
        )
    wishes = Wishes(
        on=on, nodes=nodes, per_node=gpus_per_node or processes_per_node, gpus=gpus_per_node is not None, hostfile=hostfile,
        include=include, exclude=exclude, runner=runner, meet=meet, time=time, partition=partition, account=account,
        array=array, spare=spare, max_restarts=max_restarts, grace=grace, name=name, env=tuple(env or ()), image=image,
        namespace=namespace, claim=claim, kind=kind, python=python, program=program, extra=tuple(extra or ()), template=template,
    )  # fmt: skip
    job = make(verb_for, config, overrides or (), wishes, Path.cwd())
    plan = LAUNCHERS[on](job, environment.everything())
    for line in shown(job, plan, whole=dry_run):
        typer.echo(line)
    if not dry_run:
        write(plan)
        begin(plan)
