"""A job for DeepSpeed's launcher: over ssh by pdsh, or by Open MPI; without a hostfile on this machine.

No value is read by a shell here, but over pdsh DeepSpeed hands text to one: only what no shell changes is let through.
"""

from __future__ import annotations

from collections.abc import Mapping

from roots_dist.runs.launch.hosts import slots_file
from roots_dist.runs.launch.job import Job, LaunchPlan
from roots_dist.runs.launch.options import DeepSpeedOptions, HostfileOptions
from roots_dist.runs.launch.quoting import PLAIN, plain, refused
from roots_dist.runs.launch.render import Setting

EXPORTED_BY_DEEPSPEED = ("MLFLOW", "NCCL", "PYTHON", "MV2", "UCX")
"""Prefixes of variables that deepspeed's pdsh runner writes into the command line of a remote shell, unquoted."""
RUNNERS = ("pdsh", "openmpi")


def plan(job: Job, environ: Mapping[str, str]) -> LaunchPlan:
    options = job.options
    assert isinstance(options, DeepSpeedOptions), options
    runner = options.runner or RUNNERS[0]
    if runner not in RUNNERS:
        raise refused("--runner", runner, "pdsh or openmpi with --on deepspeed", "choose one of the two")
    if not job.hosts and job.nodes > 1:
        expected = "a hostfile for more than one node"
        raise refused("--nodes", job.nodes, expected, "add --hostfile FILE, with a line HOST slots=N for each node")
    settings: dict[str, Setting] = {
        "PROCESSES_PER_NODE": job.processes_per_node,
        "HOSTFILE": "",
        "INCLUDE": "",
        "EXCLUDE": "",
        "RUNNER": runner,
        "MASTER_ADDR": "",
        "MASTER_PORT": job.port,
        "LOGS": str(job.directory / job.files / "logs"),
        "extra": options.extra,
    }
    return _on_hosts(job, environ, settings) if job.hosts else _here(job, environ, settings)


def _on_hosts(job: Job, environ: Mapping[str, str], settings: dict[str, Setting]) -> LaunchPlan:
    runner = settings["RUNNER"]
    unset: tuple[str, ...] = ()
    if runner == "pdsh":
        _check_words(job)
        exported = [name for name in environ if name.startswith(EXPORTED_BY_DEEPSPEED) and name not in job.env]
        unset = tuple(sorted(name for name in exported if not PLAIN.fullmatch(environ[name])))
    file, hostfile, env_file = (job.files / name for name in ("deepspeed.sh", "hostfile", "deepspeed_env"))
    settings |= {"HOSTFILE": str(job.directory / hostfile), "MASTER_ADDR": job.hosts[0].name}
    if any(len(host.slots) < host.all_slots for host in job.hosts):
        if runner == "openmpi":
            fix = "lower slots= in the hostfile, or use --runner pdsh"
            assert isinstance(job.options, HostfileOptions)
            raise refused("--include", job.options.include, "whole hosts with --runner openmpi", fix)
        settings["INCLUDE"] = "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in job.hosts)
    notes = ["no .deepspeed_env is read, neither here nor in the home folder: give variables with --env NAME=VALUE"]
    if runner == "pdsh":
        notes.insert(0, "SIGINT or SIGTERM to it stops the run with a checkpoint; no other signal reaches the ranks")
    if unset:
        notes.append(f"left out, since a shell would change them: {', '.join(unset)}")
    return LaunchPlan(
        command=("bash", str(file)),
        programs={"bash": "--on", job.python: "--python"},
        files={
            hostfile: slots_file((host.name, host.all_slots) for host in job.hosts),
            env_file: "".join(f"{name}={value}\n" for name, value in job.env.items()),
            file: job.script(settings, variables={"DS_ENV_FILE": str(job.directory / env_file)}),
        },
        unset=unset,
        logs=f"{job.files / 'logs'}, a file for each rank",
        notes=tuple(notes),
    )


def _check_words(job: Job) -> None:
    """Refuse what a shell on the hosts would change."""
    for name, value in job.env.items():
        plain(f"--env {name}", value, "pdsh")
    places = (("python", job.python), ("the current folder", str(job.directory)), ("track.folder", str(job.folder)))
    for key, value in places:
        plain(key, value, "pdsh")
    for i, word in enumerate(job.words):
        plain(f"override {i}" if i else "CONFIG", word, "pdsh")


def _here(job: Job, environ: Mapping[str, str], settings: dict[str, Setting]) -> LaunchPlan:
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    too_few = 0 < len(visible) < job.processes_per_node
    if job.gpus and too_few:
        expected, fix = f"{job.processes_per_node} devices, one for each process", "show more, or lower --gpus-per-node"
        raise refused("CUDA_VISIBLE_DEVICES", ",".join(visible), expected, fix)
    file = job.files / "deepspeed.sh"
    return LaunchPlan(
        command=("bash", str(file)),
        programs={"bash": "--on", job.python: "--python"},
        files={file: job.script(settings, variables=job.env)},
        unset=("CUDA_VISIBLE_DEVICES",) if too_few else (),
        logs="this terminal",
        notes=("SIGTERM to it stops the run with a checkpoint, if it takes less than 30 s; no other signal does",),
    )
