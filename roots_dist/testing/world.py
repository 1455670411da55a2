"""A world of processes on this machine, for tests and proofs: run one function on every rank, get every rank's result.

    on_world(4, function, *args) --forkserver--> function(rank, 4, *args) in 4 processes of a gloo group --files--> list

The forkserver has imported torch, DeepSpeed and this package once, so a world starts in a fraction of a second; each is
new, because DeepSpeed and torch.distributed leave globals behind. What a rank returns comes back through a file, read
without unpickling code. A rank that fails ends the world, one that hangs is killed and says where it stood.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.fx.experimental.symbolic_shapes",
    "numpy",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # drags in torch._dynamo, which DeepSpeed's optimizers need
    "pytest",  # a child imports the parent's main module again, and that is often pytest's
    "roots_dist.parallel.zero.engine",
    "roots_dist.runs.train.loop",
    "roots_dist.testing.parity",
]
"""What every world needs. A suite adds what its functions import for seconds, before its first world."""
FORKSERVER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
GRACE_S = 5.0
"""How long the others may go on after one rank has failed: gloo tells them within half a second."""
LINGER_S = 2.0
"""How long a rank that is done keeps its connections open for those that are still reading."""
ATTEMPTS = 3
"""To connect: on a crowded machine gloo's mesh fails now and then (pytorch issue 53270), before any rank has begun."""
CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo says on a rank whose peer has gone or is stuck: seldom the cause."""


class WorldFailed(RuntimeError):
    """Ranks of a test world raised, died or hung. The likeliest cause comes first."""


def on_world(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """`[function(rank, size, *args) for rank in range(size)]`, each rank in its own new process, all in one gloo group.

    `function` is a module's own (no lambda), its arguments can be pickled, and it returns tensors, numbers, strings and
    None in dicts, lists and tuples. Raises WorldFailed with the traceback of every rank that failed, or where each one
    stood when `timeout` seconds were over. From a script, call it under `if __name__ == "__main__":`.
    """
    import torch

    _start_forkserver()
    for left in reversed(range(ATTEMPTS)):
        folder = Path(tempfile.mkdtemp(prefix="world-"))
        try:
            codes, hung = _live(size, folder, timeout, function, args)
            if not hung and not any(codes):
                return [torch.load(_file(folder, rank, "result"), weights_only=True) for rank in range(size)]
            if not left or not _never_met(folder, size):
                raise WorldFailed(_report(folder, codes, hung, timeout))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError("the last attempt returns or raises")


def _live(
    size: int, folder: Path, timeout: float, function: Callable[..., Any], args: tuple
) -> tuple[list[int | None], list[int]]:
    """Exit codes, and the ranks that had to be killed."""
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=_rank, args=(rank, size, str(folder), timeout, function, args), daemon=True)
        for rank in range(size)
    ]
    try:
        for process in ranks:
            process.start()
        hung = _wait(ranks, time.monotonic() + timeout)
        return [process.exitcode for process in ranks], hung
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


def _never_met(folder: Path, size: int) -> bool:
    """A rank failed to connect, and so no rank has begun."""
    errors = [file.read_text() for rank in range(size) if (file := _file(folder, rank, "error")).exists()]
    complete_from_model = any(_file(folder, rank, "complete_from_model").exists() for rank in range(size))
    return not complete_from_model and any(f"in {_meet.__name__}\n" in error for error in errors)


def _start_forkserver() -> None:
    """Once per parent; later calls find it running. It inherits the environment of this moment, for its worlds."""
    forkserver.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    os.environ.update(FORKSERVER_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _file(folder: Path, rank: int, what: str) -> Path:
    return folder / f"{what}{rank}"


def _rank(rank: int, size: int, folder_name: str, timeout: float, function: Callable[..., Any], args: tuple) -> None:
    """The life of one rank."""
    gc.freeze()  # what the forkserver has imported stays; looking through it takes longer than most tests
    folder = Path(folder_name)
    os.dup2(os.open(_file(folder, rank, "stderr"), os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.enable(file=2)  # says where native code crashed
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # the parent asks a rank that hangs where it stands
    threading.Thread(target=_die_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, on collectives that DeepSpeed uses
    try:
        _with_group(rank, size, folder, timeout, function, args)
    except BaseException:  # also SystemExit: a rank that leaves early has failed
        _file(folder, rank, "error").write_text(f"{time.time():.6f}\n{traceback.format_exc()}")
        os._exit(1)


def _with_group(rank: int, size: int, folder: Path, timeout: float, function: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    loopback = "lo0" if sys.platform == "darwin" else "lo"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": loopback}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size}
    os.environ.update(address | {name: str(value) for name, value in place.items()})  # DeepSpeed asserts they are set
    torch.set_num_threads(1)
    _meet(rank, size, folder, timeout)
    _file(folder, rank, "complete_from_model").touch()
    result = function(rank, size, *args)
    unfinished = _file(folder, rank, "unfinished")
    torch.save(result, unfinished)
    unfinished.rename(_file(folder, rank, "result"))
    until = time.monotonic() + LINGER_S
    while time.monotonic() < until and not all(_file(folder, other, "result").exists() for other in range(size)):
        time.sleep(0.01)
    dist.destroy_process_group()


def _meet(rank: int, size: int, folder: Path, timeout: float) -> None:
    """Nobody returns before all are here: until then a world may be tried again."""
    import torch
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    if size > 1:
        dist.all_reduce(torch.zeros(1))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _wait(ranks: list, deadline: float) -> list[int]:
    """Until all ranks have ended. Returns those that had to be killed, after each has written down where it stood."""
    while running := [process for process in ranks if process.is_alive()]:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() >= deadline:
            for process in running:
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            for process in running:
                process.kill()
                process.join()
            return [ranks.index(process) for process in running]
        wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
    return []


def _report(folder: Path, codes: list[int | None], hung: list[int], timeout: float) -> str:
    """What happened on each rank that failed: own errors in the order of time, what they brought about, then hangs."""
    found = []
    for rank, code in enumerate(codes):
        stderr_file, error_file = _file(folder, rank, "stderr"), _file(folder, rank, "error")
        stderr = stderr_file.read_text(errors="replace").strip() if stderr_file.exists() else ""
        if error_file.exists():
            when, trace = error_file.read_text().split("\n", 1)
            consequence = any(words in trace for words in CONSEQUENCES)
            found.append((1 if consequence else 0, float(when), f"rank {rank} raised:\n{trace.strip()}"))
        elif rank in hung:
            found.append((2, rank, f"rank {rank} was still running and was killed; it stood here:\n{stderr}"))
        elif code:
            found.append((0, rank, f"rank {rank} died with exit code {code}:\n{stderr}"))
    head = f"of {len(codes)} ranks, {len(found)} failed"
    if len(hung) == len(found):
        head += f" to finish within {timeout:g} s"
    return "\n\n".join([head, *(text for *_, text in sorted(found))])
