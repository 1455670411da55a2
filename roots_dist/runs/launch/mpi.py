"""A job for mpirun of Open MPI or MPICH: the ranks read who they are from the variables that it sets."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from roots_dist.runs.launch.hosts import slots_file
from roots_dist.runs.launch.job import Job, LaunchPlan
from roots_dist.runs.launch.options import MpiOptions
from roots_dist.runs.launch.quoting import refused
from roots_dist.runs.launch.render import Setting


def plan(job: Job, environ: Mapping[str, str]) -> LaunchPlan:
    options, file, hostfile = job.options, job.files / "mpi.sh", job.files / "hostfile"
    assert isinstance(options, MpiOptions), options
    program = options.program or "mpirun"
    if job.nodes > 1 and not job.hosts:
        expected = "a hostfile for more than one node"
        raise refused("--nodes", job.nodes, expected, "add --hostfile FILE, with a line HOST slots=N for each node")
    mpi = options.runner or _which_mpi(program)
    if mpi not in ("openmpi", "mpich"):
        raise refused("--runner", mpi, "openmpi or mpich with --on mpi", "say which mpirun it is with --runner")
    if any(host.slots != tuple(range(len(host.slots))) for host in job.hosts):
        expected, fix = "slots from 0 on, since mpirun cannot choose devices", "use --on deepspeed, or whole hosts"
        raise refused("--include", options.include, expected, fix)
    settings: dict[str, Setting] = {
        "HOSTFILE": str(hostfile) if job.hosts else "",
        "NODES": job.nodes,
        "PROCESSES_PER_NODE": job.processes_per_node,
        "MASTER_ADDR": job.hosts[0].name if job.hosts else "",
        "MASTER_PORT": job.port,  # MPICH gives jobs no number: two runs on one machine would meet each other
        "MPIRUN": program,
        "MPI": mpi,
        "exports": tuple(job.env),
        "extra": options.extra,
    }
    hosts = {hostfile: slots_file((host.name, len(host.slots)) for host in job.hosts)} if job.hosts else {}
    return LaunchPlan(
        command=("bash", str(file)),
        programs={"bash": "--on", program: "--program"},
        files={**hosts, file: job.script(settings, variables=job.env)},
        logs="this terminal",
        notes=("SIGUSR1 to mpirun stops it with a checkpoint; SIGTERM may leave too little time",),
    )


def _which_mpi(program: str) -> str | None:
    """Ask a program which MPI it belongs to."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20).stdout.lower()
    except (OSError, subprocess.SubprocessError) as error:
        expected = f"a program that can be asked for its version ({error})"
        fix = "load the site's MPI, or give --program PATH, and --runner openmpi or mpich"
        raise refused("--program", program, expected, fix) from None
    if "open mpi" in said or "openrte" in said:
        return "openmpi"
    return "mpich" if "hydra" in said or "mpich" in said else None
