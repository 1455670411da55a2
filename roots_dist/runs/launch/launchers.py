"""A job as each launcher wants it: one function each, from Job to Plan. Pure, but for reading a template.

    Job --LAUNCHERS[on]--> Plan: files to write, variables to set, one argument list to run --submit.py--> begun

No value is ever read by a shell here: what is run is a list, and what a script contains is quoted by templates.py. Where a
launcher hands text to a shell by itself (DeepSpeed over pdsh), only what no shell changes is let through.
"""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from roots_dist.runs.launch import kubernetes
from roots_dist.runs.launch.hosts import Host
from roots_dist.runs.launch.job import Job, Plan
from roots_dist.runs.launch.quoting import PLAIN, argument, plain, refused
from roots_dist.runs.launch.templates import render
from roots_dist.runs.ranks.local import loopback, signals

EXPORTED_BY_DEEPSPEED = ("MLFLOW", "NCCL", "PYTHON", "MV2", "UCX")
"""Variables that begin so are written into the command line of a remote shell by deepspeed's pdsh runner, unquoted."""

DEEPSPEED = ("-m", "deepspeed.launcher.runner")
DEEPSPEED_HERE = ("-u", "-m", "deepspeed.launcher.launch")
"""What the runner starts on each node."""


def torchrun(job: Job, environ: Mapping[str, str]) -> Plan:
    """One node: this one. Many: the same command is given on each of them, by hand or by a site's own tool."""
    wishes, logs = job.wishes, job.files / "logs"
    if job.nodes > 1 and wishes.meet is None:
        raise refused(
            "--meet", None, f"HOST:PORT, where the agents of {job.nodes} nodes meet", "add --meet FIRST_NODE:29400"
        )
    meet = argument("--meet", wishes.meet) if wishes.meet is not None else "localhost:0"
    notes = (f"give the same command on each of the {job.nodes} nodes",) if job.nodes > 1 else ()
    return Plan(
        command=(
            job.python, "-m", "torch.distributed.run",
            *met(job), *job.agent(signals()), f"--rdzv-id={job.name}", f"--rdzv-endpoint={meet}",
            f"--log-dir={logs}", "--tee=3",
            *(("--local-addr=127.0.0.1",) if job.nodes == 1 else ()),
            *wishes.extra,
            *job.command,
        ),
        variables={**_loopback(job, environ), **job.variables},
        logs=f"{logs}/*/attempt_*/RANK/stdout.log, stderr.log",
        notes=notes,
    )  # fmt: skip


def met(job: Job) -> tuple[str, ...]:
    return (f"--nnodes={job.nodes}", "--rdzv-backend=c10d")


def _loopback(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """For gloo on one machine, unless the user has said another interface."""
    return (
        {"GLOO_SOCKET_IFNAME": loopback()}
        if job.nodes == 1 and not job.gpus and "GLOO_SOCKET_IFNAME" not in environ
        else {}
    )


def deepspeed(job: Job, environ: Mapping[str, str]) -> Plan:
    """Over ssh by pdsh, or by Open MPI; without a hostfile on this machine."""
    wishes, runner, logs = job.wishes, job.wishes.runner or "pdsh", job.files / "logs"
    if runner not in ("pdsh", "openmpi"):
        raise refused("--runner", runner, "pdsh or openmpi with --on deepspeed", "choose one of the two")
    if not job.hosts:
        if job.nodes > 1:
            raise refused(
                "--nodes",
                job.nodes,
                "--hostfile FILE for more than one node",
                "write one line of HOST slots=N for each",
            )
        return _deepspeed_here(job, environ)
    hostfile, variables = job.files / "hostfile", job.env
    unset: tuple[str, ...] = ()
    if runner == "openmpi":  # which tells the ranks nothing of its own --master_addr
        variables = {"MASTER_ADDR": job.hosts[0].name, "MASTER_PORT": str(job.port), **job.env}
    else:
        for name, value in job.env.items():
            plain(f"--env {name}", value, "pdsh")
        for key, value in (
            ("python", job.python),
            ("the current folder", str(job.directory)),
            ("track.folder", str(job.folder)),
        ):
            plain(key, value, "pdsh")
        for i, word in enumerate(job.words):
            plain(f"override {i}" if i else "CONFIG", word, "pdsh")
        exported = [name for name in environ if name.startswith(EXPORTED_BY_DEEPSPEED) and name not in variables]
        unset = tuple(sorted(name for name in exported if not PLAIN.fullmatch(environ[name])))
    options = [f"--hostfile={job.directory / hostfile}", f"--launcher={runner}", "--force_multi"]
    options += [f"--master_addr={job.hosts[0].name}", f"--master_port={job.port}"]
    if any(len(host.slots) < host.all_slots for host in job.hosts):
        if runner == "openmpi":
            raise refused(
                "--include",
                wishes.include,
                "whole hosts with --runner openmpi",
                "lower slots= in the hostfile, or use pdsh",
            )
        options.append("--include=" + "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in job.hosts))
    if wishes.extra:
        options.append(f"--launcher_args={shlex.join(wishes.extra)}")
    return Plan(
        command=(job.python, *DEEPSPEED, *options, f"--enable_each_rank_log={job.directory / logs}", *script(job)),
        files={
            hostfile: slots_file(job.hosts),
            job.files / "deepspeed_env": "".join(f"{n}={v}\n" for n, v in variables.items()),
        },
        variables={"DS_ENV_FILE": str(job.directory / job.files / "deepspeed_env")},
        unset=unset,
        logs=f"{logs}, a file for each rank",
        notes=(
            *(
                ("SIGINT or SIGTERM to it stops the run with a checkpoint; no other signal reaches the ranks",)
                if runner == "pdsh"
                else ()
            ),
            "no .deepspeed_env is read, neither here nor in the home folder: give variables with --env NAME=VALUE",
            *((f"left out, since a shell would change them: {', '.join(unset)}",) if unset else ()),
        ),
    )


def _deepspeed_here(job: Job, environ: Mapping[str, str]) -> Plan:
    """Without the runner: it would go to other hosts where there is a /job/hostfile, use GPUs that CUDA_VISIBLE_DEVICES
    hides, and leave the ranks behind, still training, when it is told to end."""
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if job.gpus and 0 < len(visible) < job.per_node:
        expected = f"{job.per_node} devices, one for each process"
        raise refused(
            "CUDA_VISIBLE_DEVICES", ",".join(visible), expected, "show more of them, or lower --gpus-per-node"
        )
    devices = visible[: job.per_node] if len(visible) >= job.per_node else list(range(job.per_node))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    meeting = ("--master_addr=127.0.0.1", f"--master_port={job.port}")
    return Plan(
        command=(job.python, *DEEPSPEED_HERE, f"--world_info={world}", *meeting, *job.wishes.extra, *script(job)),
        variables={**_loopback(job, environ), **job.env},
        logs="this terminal",
        notes=(
            "SIGTERM to it stops the run with a checkpoint, if 30 s are enough for a step and that; no other signal does",
        ),
    )


def script(job: Job) -> tuple[str, ...]:
    return ("--no_local_rank", "--module", *job.command[1:])


def mpi(job: Job, environ: Mapping[str, str]) -> Plan:
    """Open MPI or MPICH; the ranks find themselves in the variables that either sets, and rank 0 on the first host."""
    wishes, program = job.wishes, job.wishes.program or "mpirun"
    if job.nodes > 1 and not job.hosts:
        raise refused(
            "--nodes", job.nodes, "--hostfile FILE for more than one node", "write one line of HOST slots=N for each"
        )
    flavour = wishes.runner or _flavour(program)
    if flavour not in ("openmpi", "mpich"):
        raise refused("--runner", flavour, "openmpi or mpich with --on mpi", "say which mpirun it is with --runner")
    if any(len(host.slots) < host.all_slots and host.slots != tuple(range(len(host.slots))) for host in job.hosts):
        raise refused(
            "--include",
            wishes.include,
            "slots from 0 on: mpirun cannot choose devices",
            "use --on deepspeed, or whole hosts",
        )
    ranks, hostfile = job.nodes * job.per_node, job.files / "hostfile"
    meeting = {"MASTER_ADDR": job.hosts[0].name} if job.hosts else {}
    meeting["MASTER_PORT"] = str(job.port)  # MPICH numbers no jobs: two runs on one machine would meet each other
    variables = {**meeting, **job.env}
    if flavour == "openmpi":
        variables = {"TTY_COMPATIBLE": "0", **variables}  # it gives ranks a terminal where there is none: no live line
        options = [
            "-np",
            str(ranks),
            "--map-by",
            f"ppr:{job.per_node}:node",
            "--bind-to",
            "none",
            "--wdir",
            str(job.directory),
        ]
        options += [word for name in variables for word in ("-x", name)]  # with the value that it has for mpirun itself
        files = {hostfile: slots_file(job.hosts)} if job.hosts else {}
        options += ["--hostfile", str(hostfile)] if job.hosts else []
    else:
        options = ["-n", str(ranks), "-ppn", str(job.per_node), "-wdir", str(job.directory)]
        files = {hostfile: "".join(f"{host.name}:{len(host.slots)}\n" for host in job.hosts)} if job.hosts else {}
        options += ["-f", str(hostfile)] if job.hosts else []
    return Plan(
        command=(program, *options, *wishes.extra, job.python, *job.command),
        files=files,
        variables=variables,
        logs="this terminal",
        notes=("SIGUSR1 to mpirun stops it with a checkpoint; SIGTERM may leave too little time",),
    )


def slots_file(hosts: tuple[Host, ...]) -> str:
    return "".join(f"{host.name} slots={host.all_slots}\n" for host in hosts)


def _flavour(program: str) -> str | None:
    """Which MPI a program belongs to, by what it says of itself."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20).stdout.lower()
    except (OSError, subprocess.SubprocessError) as error:
        expected = f"a program that can be asked for its version ({error})"
        raise refused(
            "--program", program, expected, "load the site's MPI, or say --program PATH, --runner openmpi or mpich"
        ) from None
    return (
        "openmpi"
        if "open mpi" in said or "openrte" in said
        else "mpich"
        if "hydra" in said or "mpich" in said
        else None
    )


def slurm(job: Job, environ: Mapping[str, str]) -> Plan:
    """A batch script that starts one torchrun on each node, is told before its time is over, and queues itself again."""
    wishes, script, logs = job.wishes, job.files / "slurm.sh", job.directory / job.files / "logs"
    if "\\" in str(logs):
        raise refused(
            "track.folder", str(logs), "no backslash: sbatch reads it as something else in names of logs", "rename it"
        )
    number = "%A_%a" if wishes.array else "%j"
    options = {
        "job-name": job.name,
        "nodes": job.nodes + wishes.spare,
        "ntasks-per-node": 1,
        "chdir": job.directory,
        "output": f"{_no_pattern(logs)}/slurm-{number}.log",
        "open-mode": "append",
        "signal": f"B:USR1@{wishes.grace}",
        "time": wishes.time,
        "partition": wishes.partition,
        "account": wishes.account,
        "gpus-per-node": job.per_node if job.gpus else None,
        "array": f"1-{wishes.array}%1" if wishes.array else None,
    }
    values = {
        "job": job,
        "logs": logs,
        "log_pattern": _no_pattern(logs),
        "agent": ("-m", "torch.distributed.run", *met(job), *job.agent()),
        "environ": job.variables,
        "check_seconds": 120,
    }
    return Plan(
        command=(
            wishes.program or "sbatch",
            *(f"--{name}={value}" for name, value in options.items() if value is not None),
            "--requeue",
            *wishes.extra,
            str(script),
        ),
        files={script: render("slurm.sh", wishes.template, values), logs / ".keep": ""},
        logs=f"{logs}/slurm-JOB.log, and JOB-NODE.log for each node",
        notes=(f"{wishes.grace} s before its time is over it writes a checkpoint and " + _then(job),),
    )


def _then(job: Job) -> str:
    return f"the next of {job.wishes.array} array jobs goes on" if job.wishes.array else "queues itself again"


def _no_pattern(path: Path) -> str:
    """A path in which Slurm replaces nothing."""
    return str(path).replace("%", "%%")


LAUNCHERS: Mapping[str, Callable[[Job, Mapping[str, str]], Plan]] = {
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "slurm": slurm,
    "mpi": mpi,
    "kubernetes": kubernetes.plan,
}
"""--on NAME. One function each, of the job and the variables that are set here."""
