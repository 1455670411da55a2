"""The options of `roots launch`: a class for each launcher, which holds every option that this launcher uses.

command line --one instance of each class--> check_options.py: the chosen launcher's, no other given --> job.py

An option of several launchers is inherited by their classes. One that the chosen launcher's class does not hold is
refused if its value is not the default. Nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Options that every launcher uses."""

    launcher: ClassVar[str]
    """The value of --on."""

    nodes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="machines [default: 1, or those of the hostfile]", show_default=False),
    ] = None
    processes_per_node: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="on each node [default: tp × cp × pp, shared out]", show_default=False),
    ] = None
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="one process for each, and ask the launcher for them", show_default=False
        ),
    ] = None
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="of the job [default: from CONFIG]", show_default=False)
    ] = None
    env: Annotated[
        tuple[str, ...],
        typer.Option(metavar="NAME=VALUE", help="variable for every rank; may be repeated", show_default=False),
    ] = ()
    python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="on the nodes [default: this one; kubernetes: the image's]", show_default=False
        ),
    ] = None
    extra: Annotated[
        tuple[str, ...],
        typer.Option(metavar="WORD", help="one more argument for the launcher; may be repeated", show_default=False),
    ] = ()
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="edited copy of the launcher's script or manifest", show_default=False),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TorchrunAgentOptions(JobOptions):
    """Options of launchers that start one torchrun on each node."""

    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="torchrun, slurm, kubernetes: restarts after a rank fails")
    ] = 0
    grace: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="torchrun, slurm, kubernetes: time for a step and a checkpoint after a signal",
        ),
    ] = 120


@dataclass(frozen=True, kw_only=True)
class HostfileOptions(JobOptions):
    """Options of launchers that reach the hosts of a hostfile by themselves."""

    hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="deepspeed, mpi: lines of HOST slots=N", show_default=False)
    ] = None
    include: Annotated[
        str | None,
        typer.Option(metavar="a@b:0,1", help="deepspeed, mpi: only these hosts and slots", show_default=False),
    ] = None
    exclude: Annotated[
        str | None,
        typer.Option(metavar="a@b:0,1", help="deepspeed, mpi: all but these hosts and slots", show_default=False),
    ] = None
    runner: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="deepspeed: pdsh or openmpi; mpi: openmpi or mpich", show_default=False),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ProgramOptions(JobOptions):
    """Options of launchers that are programs of the site."""

    program: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="slurm, mpi, kubernetes: your sbatch, mpirun or kubectl", show_default=False),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TorchrunOptions(TorchrunAgentOptions):
    launcher: ClassVar[str] = "torchrun"

    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="torchrun: where several nodes meet", show_default=False)
    ] = None


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions(HostfileOptions):
    launcher: ClassVar[str] = "deepspeed"


@dataclass(frozen=True, kw_only=True)
class SlurmOptions(TorchrunAgentOptions, ProgramOptions):
    launcher: ClassVar[str] = "slurm"

    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="slurm: limit of one job", show_default=False)
    ] = None
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="slurm: partition of the job", show_default=False)
    ] = None
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="slurm: account of the job", show_default=False)
    ] = None
    array: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="slurm: number of jobs, run one after another", show_default=False),
    ] = None
    spare: Annotated[
        int, typer.Option(min=0, metavar="N", help="slurm: additional nodes; all are examined, faulty ones left out")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class MpiOptions(HostfileOptions, ProgramOptions):
    launcher: ClassVar[str] = "mpi"


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions(TorchrunAgentOptions, ProgramOptions):
    launcher: ClassVar[str] = "kubernetes"

    image: Annotated[
        str | None, typer.Option(metavar="NAME", help="kubernetes: image with roots in it", show_default=False)
    ] = None
    pvc: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="kubernetes: volume claim with data and runs", show_default=False),
    ] = None
    namespace: Annotated[str, typer.Option(metavar="NAME", help="kubernetes: namespace of the job")] = "default"
    kind: Annotated[str, typer.Option(metavar="NAME", help="kubernetes: job (Indexed Job) or trainjob (Kubeflow)")] = (
        "job"
    )


OPTIONS: tuple[type[JobOptions], ...] = (
    TorchrunOptions,
    DeepSpeedOptions,
    SlurmOptions,
    MpiOptions,
    KubernetesOptions,
)
