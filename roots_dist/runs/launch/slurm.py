"""A job for Slurm: a batch script with one torchrun on each node, signaled before its limit, which requeues itself.

The options of sbatch are on its command line, since it reads spaces and quotes in #SBATCH lines by rules of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from roots_dist.runs.launch.job import Job, LaunchPlan
from roots_dist.runs.launch.options import SlurmOptions
from roots_dist.runs.launch.quoting import refused
from roots_dist.runs.launch.render import Setting


def plan(job: Job, environ: Mapping[str, str]) -> LaunchPlan:
    options, file, logs = job.options, job.files / "slurm.sh", job.directory / job.files / "logs"
    assert isinstance(options, SlurmOptions), options
    if "\\" in str(logs):
        expected = "a folder without a backslash, which sbatch does not take literally in names of logs"
        raise refused("track.folder", str(logs), expected, "rename it")
    command = (*_sbatch(job, options, logs), str(file))
    settings: dict[str, Setting] = {
        "PROCESSES_PER_NODE": job.processes_per_node,
        "SPARE_NODES": options.spare,
        "MAX_RESTARTS": options.max_restarts,
        "GRACE": options.grace,
        "RUN": str(job.directory / job.folder),
        "LOGS": str(logs),
    }
    comment = f"; submit it again with: {shlex.join(command)}"
    then = f"the next of {options.array} array jobs resumes" if options.array else "requeues itself"
    return LaunchPlan(
        command=command,
        programs={command[0]: "--program"},
        files={file: job.script(settings, variables=job.env, comment=comment), logs / ".keep": ""},
        logs=f"{logs}/slurm-JOB.log, and JOB-NODE.log for each node",
        notes=(f"{options.grace} s before its time is over it writes a checkpoint and {then}",),
    )


def _sbatch(job: Job, options: SlurmOptions, logs: Path) -> tuple[str, ...]:
    number = "%A_%a" if options.array else "%j"
    values = {
        "job-name": job.name,
        "nodes": job.nodes + options.spare,
        "ntasks-per-node": 1,
        "chdir": job.directory,
        "output": f"{str(logs).replace('%', '%%')}/slurm-{number}.log",
        "open-mode": "append",
        "signal": f"B:USR1@{options.grace}",
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "cpus-per-task": None if _says_cores(options.extra) else job.processes_per_node * job.threads,
        "gpus-per-node": job.processes_per_node if job.gpus else None,
        "array": f"1-{options.array}%1" if options.array else None,
    }
    given = (f"--{name}={value}" for name, value in values.items() if value is not None)
    return (options.program or "sbatch", *given, "--requeue", *options.extra)


def _says_cores(extra: tuple[str, ...]) -> bool:
    """True if --extra asks for cores. Otherwise Slurm gives the one task of a node a single core."""
    return any(word.partition("=")[0] in ("--cpus-per-task", "-c", "--exclusive", "--cpus-per-gpu") for word in extra)
