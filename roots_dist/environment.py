"""The launcher's variables: this process's rank, the world size, the rendezvous address. The only reader of os.environ.

    torchrun, deepspeed | mpirun | srun --variables--> discover() --World--> runs/ranks/, which joins it

`None` means that no launcher started this process: `roots train` then starts the ranks itself (runs/ranks/local.py).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from roots_dist.errors import EnvironmentProblem
from roots_dist.slurm import first_host, tasks_per_node

# launcher -> (rank, world size, local rank, local size). The first whose rank is set is used: torchrun comes first
# because under `srun torchrun` the Slurm variables are set too, and they count nodes, not processes.
LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}
FAILURES = "ROOTS_FAILURES"
LAUNCHER_PID = "ROOTS_LAUNCHER_PID"


@dataclass(frozen=True)
class World:
    """One process among those that a launcher started."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    launcher: str
    failures: str | None = None
    """Folder in which our own launcher looks for failure records; None under another launcher."""
    launcher_pid: int | None = None
    """Process id of our own launcher; a rank does not outlive it."""

    def __str__(self) -> str:
        number = "1 process" if self.size == 1 else f"{self.size} processes"
        here = f"started by {self.launcher}, {self.local_size} on this machine"
        return f"{number}, {here}; they meet at {self.master_addr}:{self.master_port}"


def discover(environ: Mapping[str, str] | None = None) -> World | None:
    """Read the world from the launcher's variables; None without a launcher. Raises EnvironmentProblem if they
    contradict each other."""
    environ = os.environ if environ is None else environ
    launcher = next((name for name, names in LAUNCHERS.items() if names[0] in environ), None)
    if launcher is None or (launcher == "Slurm" and not _in_slurm_step(environ)):
        return None
    rank_name, size_name, local_rank_name, local_size_name = LAUNCHERS[launcher]
    size = _number(environ, size_name, launcher, least=1)
    rank = _number(environ, rank_name, launcher)
    local_rank = _local_rank(environ, launcher, size, rank)
    local_size = _local_size(environ, launcher, size, local_rank)
    for name, value, limit_name, limit in (
        (rank_name, rank, size_name, size),
        (local_rank_name, local_rank, local_size_name, local_size),
        (local_size_name, local_size - 1, size_name, size),
    ):
        if value >= limit:
            found = environ.get(name, value)
            raise _error(
                f"{name} = {found}", f"less than {limit_name} = {limit}", f"start all processes with one {launcher}"
            )
    addr, port = _rendezvous(environ, launcher, size, local_size, rank)
    pid = environ.get(LAUNCHER_PID)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        master_addr=addr,
        master_port=port,
        launcher=launcher,
        failures=environ.get(FAILURES),
        launcher_pid=int(pid) if pid is not None and pid.isdecimal() else None,
    )


def single_process() -> World:
    """The world of a process that no launcher started."""
    return World(0, 1, 0, 1, "127.0.0.1", 0, "none")


def variables(world: World) -> dict[str, str]:
    """The world as torch's variables, which DeepSpeed requires under any launcher."""
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_SIZE": str(world.local_size),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(world.master_port),
    }


def export(values: Mapping[str, str], *, replace: bool = True) -> None:
    """Set variables for child processes and for libraries that have no other configuration."""
    for name, value in values.items():
        if replace:
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)


@contextmanager
def restored() -> Iterator[None]:
    """Undo at the end what the body sets: a program of the user's may start other processes later."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def unset(names: Iterable[str]) -> None:
    """Unset variables, for child processes."""
    for name in names:
        os.environ.pop(name, None)


def all_variables() -> dict[str, str]:
    """A copy of the whole environment."""
    return dict(os.environ)


def values(names: re.Pattern[str]) -> list[str]:
    """Values of all variables whose names match the pattern."""
    return [value for name, value in os.environ.items() if names.search(name)]


def uses_agent_store() -> bool:
    """True if torchrun's elastic agent already listens at the rendezvous address, so that rank 0 must not."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def start_in_store() -> str:
    """The number of this start of the ranks among those that share a store: torch's elastic agent may keep one over
    restarts. Each agent counts by itself, and one that was itself started anew begins at zero. So where every start has
    a store of its own, nothing depends on the count."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if uses_agent_store() else "0"


def is_set(name: str) -> bool:
    return bool(os.environ.get(name))


def image_commit() -> str | None:
    """Commit of the code in a container image, where there is no git repository to ask (docker/)."""
    return os.environ.get("ROOTS_COMMIT") or None


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int | None:
    """OMP_NUM_THREADS, where a user has set it, or our own launcher; None otherwise. Raises EnvironmentProblem.

    torchrun sets it to 1 for whoever has not, so a 1 under it says nothing.
    """
    said = os.environ.get("OMP_NUM_THREADS")
    if said is None or (said == "1" and "TORCHELASTIC_RUN_ID" in os.environ and FAILURES not in os.environ):
        return None
    first = said.partition(",")[0].strip()  # OpenMP allows a number for each level of nesting
    if not first.isdecimal() or int(first) < 1:
        raise _error(f"OMP_NUM_THREADS = {said!r}", "a whole number of at least 1", "unset it, or set it to 1")
    return int(first)


SPINS = "10000"
"""Turns that an idle thread of OpenMP waits awake: fractions of a millisecond. The library's own 300,000 are some
milliseconds at the end of each operation, wherever another program has the core that the last thread needs."""


def let_threads_sleep() -> None:
    """Have OpenMP's threads wait awake for a short time only, unless the user has said how they wait. Called before
    torch is imported, which reads it once."""
    if "OMP_WAIT_POLICY" not in os.environ:
        export({"GOMP_SPINCOUNT": SPINS}, replace=False)


def threads_per_process(asked: int | None, local_size: int) -> int:
    """CPU threads of each of this machine's processes: what the config asks for, else OMP_NUM_THREADS, else an equal
    share of the cores."""
    return asked or threads() or max(1, cores() // local_size)


def gpus(environ: Mapping[str, str] | None = None) -> int:
    """Number of visible NVIDIA GPUs, counted without importing torch."""
    environ = os.environ if environ is None else environ
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0  # a driver that does not answer has no usable GPU
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    return count if visible is None else min(count, len(visible.split(",")))


def has_cpp_compiler() -> bool:
    """True if the C++ compiler that torch.compile calls is found: CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """True if this is a task of srun. A batch script has SLURM_PROCID too, and an interactive shell is a step of its
    own."""
    return ("SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ) and "SLURM_PTY_PORT" not in environ


def _number(environ: Mapping[str, str], name: str, launcher: str, least: int = 0) -> int:
    value = environ.get(name)
    if value is None:
        present = [n for n in LAUNCHERS[launcher] if n in environ]
        raise _error(
            f"{name} is not set",
            f"it beside {', '.join(present)}, as {launcher} sets it",
            f"start with {launcher}, or unset {', '.join(present)}",
        )
    if not value.strip().isdecimal() or int(value) < least:
        raise _error(
            f"{name} = {value!r}", f"a whole number of at least {least}", f"start with {launcher}, or unset it"
        )
    return int(value)


def _local_rank(environ: Mapping[str, str], launcher: str, size: int, rank: int) -> int:
    name = LAUNCHERS[launcher][2]
    if launcher == "MPICH or Intel MPI" and name not in environ:
        return rank  # MPICH's process manager does not set it on one machine
    if size == 1 and name not in environ:
        return 0
    return _number(environ, name, launcher)


def _local_size(environ: Mapping[str, str], launcher: str, size: int, local_rank: int) -> int:
    """Number of processes on this machine."""
    if launcher == "Slurm":
        short = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
        if short is not None:
            counts = tasks_per_node(short)
            node = _number(environ, "SLURM_NODEID", launcher) if len(counts) > 1 else 0
            return counts[node] if node < len(counts) else local_rank + 1
    name = LAUNCHERS[launcher][3]
    if launcher == "torchrun or deepspeed" and name not in environ:
        name = "LOCAL_SIZE"  # deepspeed's launcher
    return _number(environ, name, launcher, least=1) if name in environ else size


def _rendezvous(environ: Mapping[str, str], launcher: str, size: int, local_size: int, rank: int) -> tuple[str, int]:
    """Host and port of rank 0: set by torchrun and deepspeed; under other launchers set by the user, or derived."""
    addr = environ.get("MASTER_ADDR")
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT", launcher, least=1)
        if port > 65535:
            raise _error(f"MASTER_PORT = {port}", "a port, at most 65535", "choose another")
    else:
        port = 20000 + _job_number(environ) % 20000
    if launcher == "torchrun or deepspeed":
        if size == 1:
            return addr or "127.0.0.1", port
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise _error(f"{missing[0]} is not set", "the host and port of rank 0", "start with torchrun, or set it")
        assert addr is not None
        return addr, port
    if addr is not None:
        return addr, port
    if local_size == size:
        return "127.0.0.1", port
    if launcher == "Slurm":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
        if nodes is None:
            raise _error("SLURM_JOB_NODELIST is not set", "the nodes of the job", "start with srun, or set MASTER_ADDR")
        return first_host(nodes), port
    return _host_of_mpi_rank_0(rank, size), port


def _job_number(environ: Mapping[str, str]) -> int:
    """A number that all processes of a job share; it differs between jobs where the launcher numbers them."""
    for name in ("SLURM_JOB_ID", "SLURM_JOBID", "PMI_ID", "OMPI_MCA_ess_base_jobid"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 9500


def _host_of_mpi_rank_0(rank: int, size: int) -> str:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise _error(
            "MASTER_ADDR is not set",
            f"it for MPI over several machines, or mpi4py to ask ({error})",
            "set MASTER_ADDR to the first machine, or pip install 'roots_dist[mpi]'",
        ) from None
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, size):  # mpi4py was built for another MPI than mpirun's
        library = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip("\0 ")
        raise _error(
            "MASTER_ADDR is not set",
            f"it, since mpi4py uses {library} and knows {world.Get_size()} of the {size} processes that mpirun started",
            "set MASTER_ADDR to the first machine, or start with the mpirun that mpi4py belongs to",
        )
    host = bytearray(256)
    if rank == 0:
        name = socket.gethostname().encode()
        host[: len(name)] = name
    MPI.COMM_WORLD.Bcast(host, root=0)  # a buffer: object broadcasts pickle
    return host.rstrip(b"\0").decode()


def _error(found: str, expected: str, fix: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"{found}: expected {expected}. Fix: {fix}.")
