"""A job for torchrun: the script that is run on this machine, or on each of several."""

from __future__ import annotations

from collections.abc import Mapping

from roots_dist.runs.launch.job import Job, LaunchPlan
from roots_dist.runs.launch.options import TorchrunOptions
from roots_dist.runs.launch.quoting import argument, refused
from roots_dist.runs.launch.render import Setting


def plan(job: Job, environ: Mapping[str, str]) -> LaunchPlan:
    """Plan a launch with torchrun: on one node, this one; on several, the same command is given on each, by hand or by
    a site's own tool."""
    options, logs, file = job.options, job.files / "logs", job.files / "torchrun.sh"
    assert isinstance(options, TorchrunOptions), options
    if job.nodes > 1 and options.rdzv_endpoint is None:
        expected = f"HOST:PORT, where the {job.nodes} nodes meet"
        raise refused("--rdzv-endpoint", None, expected, "add --rdzv-endpoint FIRST_NODE:29400")
    settings: dict[str, Setting] = {
        "NODES": job.nodes,
        "PROCESSES_PER_NODE": job.processes_per_node,
        "RDZV_ENDPOINT": argument("--rdzv-endpoint", options.rdzv_endpoint or ""),
        "RDZV_ID": job.name,
        "MAX_RESTARTS": options.max_restarts,
        "GRACE": options.grace,
        "LOGS": str(logs),
        "extra": options.extra,
    }
    return LaunchPlan(
        command=("bash", str(file)),
        programs={"bash": "--on", job.python: "--python"},
        files={file: job.script(settings, variables=job.env)},
        logs=f"{logs}/*/attempt_*/RANK/stdout.log, stderr.log",
        notes=(f"give the same command on each of the {job.nodes} nodes",) if job.nodes > 1 else (),
    )
