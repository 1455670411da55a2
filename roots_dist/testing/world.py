"""A world of processes on this machine, for tests and proofs: run one function on every rank and get every rank's
result.

    on_world(4, function, *args) --forkserver, for CUDA spawn--> function(rank, 4, *args) in 4 processes of a gloo group

The forkserver has imported torch, DeepSpeed and this package once, so a world starts in a fraction of a second.
`on_world` starts a new one for each call, because DeepSpeed leaves globals behind; `on_warm_world` keeps the processes.
Results come back through files, read without unpickling code. A rank that fails ends the world; one that hangs is
killed and reports where it was.
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
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from roots_dist.failures import CONSEQUENCES
from roots_dist.files import write_atomically

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
    "roots_dist.verify.trainer_trace",
]
"""Modules that every world needs. A test suite adds its own slow imports before its first world."""
ENVIRONMENTS = {
    "cpu": {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    "cuda": {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1"},
}
"""Kind of device -> variables of the ranks that compute on it."""
GRACE_S = 8.0
"""Seconds that the others may run after one rank has failed: gloo notifies them within half a second."""
LEAVE_S = 60.0
"""Seconds that a rank may take to end after its last answer."""
LINGER_S = 20.0
"""Seconds that a finished rank keeps its connections open for ranks that are still reading."""
ATTEMPTS = 3
"""Number of attempts to connect: on a crowded machine gloo's mesh fails now and then (pytorch issue 53270), before any
rank has started."""


class WorldFailed(RuntimeError):
    """Ranks of a test world raised, died or hung. The likeliest cause comes first."""


def on_world(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 120, device: str = "cpu"
) -> list[Any]:
    """`[function(rank, size, *args) for rank in range(size)]`, each rank in its own new process, all in one gloo group.

    `function` is a module's own (no lambda), its arguments can be pickled, and it returns tensors, numbers, strings and
    None in dicts, lists and tuples. Raises WorldFailed with the traceback of every rank that failed, or where each one
    stood when `timeout` seconds were over. From a script, call it under `if __name__ == "__main__":`.

    With device="cuda" the ranks see the machine's GPUs and start slowly, without the forkserver, because a process that
    has used CUDA cannot fork. The group is gloo all the same, so that several ranks may share one GPU.
    """
    with closing(RankPool(size, device)) as world:
        return world.run(function, *args, timeout=timeout)


def on_warm_world(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """The same on ranks that stay for the next call of this size, so that it costs no start. Groups are new each time.

    For functions that leave nothing behind in their process: none that patches the package, and none with a DeepSpeed
    engine. Ranks of a call that failed are killed, and the next call starts new ones.
    """
    return _warm_world(size).run(function, *args, timeout=timeout)


@cache
def _warm_world(size: int) -> RankPool:
    return RankPool(size)


class RankPool:
    """Ranks that start with the first call and run one function after another, each in a gloo group of its own."""

    def __init__(self, size: int, device: str = "cpu"):
        self.size, self.device = size, device
        self._ranks: list[_Rank] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Run the function on every rank; returns and raises as `on_world`."""
        import torch

        for left in reversed(range(ATTEMPTS)):
            folder = Path(tempfile.mkdtemp(prefix="world-"))
            succeeded, reused = False, bool(self._ranks)
            try:
                hung = self._call(folder, timeout, function, args)
                if not hung and all(rank.answered for rank in self._ranks):
                    results = [
                        torch.load(_file(folder, rank, "result"), weights_only=True) for rank in range(self.size)
                    ]
                    succeeded = True
                    return results
                may_retry = _failed_to_connect(folder, self.size) or (reused and not _has_begun(folder, self.size))
                if not left or not may_retry:  # a warm rank may have died between two calls, seen only now
                    raise WorldFailed(_report(folder, [rank.process.exitcode for rank in self._ranks], hung, timeout))
            finally:
                if not succeeded:
                    self.kill()
                shutil.rmtree(folder, ignore_errors=True)
        raise AssertionError("the last attempt returns or raises")

    def _call(self, folder: Path, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]) -> list[int]:
        """Run the function on every rank. Returns the ranks that had to be killed."""
        if not all(rank.process.is_alive() for rank in self._ranks):
            self.kill()
        if not self._ranks:
            with environment_of_ranks(self.device):
                self._ranks = [_Rank.start(rank, self.size, self.device) for rank in range(self.size)]
        for rank in self._ranks:
            rank.answered = False
            rank.calls.send((str(folder), timeout, function, args))
        return _wait(self._ranks, time.monotonic() + timeout)

    def close(self) -> None:
        """Let every rank end by itself. Raises WorldFailed if one cannot."""
        for rank in self._ranks:
            rank.calls.send(None)
        for rank in self._ranks:
            rank.process.join(LEAVE_S)
        codes = [rank.process.exitcode for rank in self._ranks]
        self.kill()
        if any(code != 0 for code in codes):
            raise WorldFailed(f"ranks that had returned ended with exit codes {codes}: expected 0 within {LEAVE_S:g} s")

    def kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.calls.close()
        self._ranks = []


@dataclass
class _Rank:
    """One process as its parent sees it."""

    process: Any
    calls: Connection
    answered: bool = False

    @classmethod
    def start(cls, rank: int, size: int, device: str) -> _Rank:
        context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        ours, its = context.Pipe()
        process = context.Process(target=_rank_main, args=(rank, size, its), daemon=True)
        process.start()
        its.close()
        return cls(process, ours)


def _failed_to_connect(folder: Path, size: int) -> bool:
    """True if a rank failed to connect, so that no rank has started."""
    return not _has_begun(folder, size) and any(
        f"in {_connect.__name__}\n" in _error(folder, rank) for rank in range(size)
    )


def _has_begun(folder: Path, size: int) -> bool:
    """True if the function has started on some rank."""
    return any(_file(folder, rank, "begun").exists() for rank in range(size))


@contextmanager
def environment_of_ranks(device: str) -> Iterator[None]:
    """The environment that ranks on this kind of device inherit. On a CPU that is the one in which the forkserver
    starts, once per parent; later calls find it running."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENTS[device])
    try:
        if device == "cpu":
            forkserver.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _file(folder: Path, rank: int, what: str) -> Path:
    return folder / f"{what}{rank}"


def _rank_main(rank: int, size: int, calls: Connection) -> None:
    """Main function of a rank: run one call after another, until it is told to end or fails."""
    gc.freeze()  # the forkserver's imports stay alive; scanning them takes longer than most tests
    threading.Thread(target=_die_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, on collectives that DeepSpeed uses
    while (call := calls.recv()) is not None:
        _answer(rank, size, *call)
        calls.send(None)
        del call
        gc.collect()


def _answer(
    rank: int, size: int, folder_name: str, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    folder = Path(folder_name)
    stderr = os.open(_file(folder, rank, "stderr"), os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)
    os.close(stderr)
    faulthandler.enable(file=2)  # says where native code crashed
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # the parent makes a hanging rank print where it is
    try:
        _run_in_group(rank, size, folder, timeout, function, args)
    except BaseException:  # includes SystemExit: a rank that exits early has failed
        write_atomically(_file(folder, rank, "error"), f"{time.time():.6f}\n{traceback.format_exc()}")
        os._exit(1)


def _run_in_group(
    rank: int, size: int, folder: Path, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    loopback = "lo0" if sys.platform == "darwin" else "lo"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": loopback}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size}
    os.environ.update(address | {name: str(value) for name, value in place.items()})  # DeepSpeed asserts they are set
    torch.set_num_threads(1)
    _connect(rank, size, folder, timeout)
    _file(folder, rank, "begun").touch()
    result = function(rank, size, *args)
    unfinished = _file(folder, rank, "unfinished")
    torch.save(result, unfinished)
    unfinished.rename(_file(folder, rank, "result"))
    until = time.monotonic() + LINGER_S
    while time.monotonic() < until and not _all_ended(folder, size):
        time.sleep(0.01)
    dist.destroy_process_group()


def _all_ended(folder: Path, size: int) -> bool:
    """True if every rank has a result, or one has failed."""
    if any(_file(folder, rank, "error").exists() for rank in range(size)):
        return True
    return all(_file(folder, rank, "result").exists() for rank in range(size))


def _connect(rank: int, size: int, folder: Path, timeout: float) -> None:
    """Connect the ranks. No rank returns before all have connected, so until then a world may be tried again."""
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


def _wait(ranks: list[_Rank], deadline: float) -> list[int]:
    """Wait until all ranks have answered or ended. Returns those that had to be killed, after each has written where it
    was."""
    while running := [rank for rank in ranks if not rank.answered and rank.process.is_alive()]:
        if any(rank.process.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() >= deadline:
            for rank in running:
                os.kill(rank.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            for rank in running:
                rank.process.kill()
                rank.process.join()
            return [ranks.index(rank) for rank in running]
        events = [end for rank in running for end in (rank.calls, rank.process.sentinel)]
        ready = wait(events, timeout=max(0.0, deadline - time.monotonic()))
        for rank in running:
            rank.answered = rank.calls in ready and _has_answered(rank.calls)
    return []


def _has_answered(calls: Connection) -> bool:
    try:
        calls.recv()
    except (EOFError, ConnectionResetError):  # the rank has died instead
        return False
    return True


def _report(folder: Path, codes: list[int | None], hung: list[int], timeout: float) -> str:
    """Report of the ranks that failed: their own errors in order of time, then consequences, then hangs."""
    found = []
    for rank, code in enumerate(codes):
        stderr_file = _file(folder, rank, "stderr")
        stderr = stderr_file.read_text(errors="replace").strip() if stderr_file.exists() else ""
        if error := _error(folder, rank):
            when, _, trace = error.partition("\n")
            consequence = any(words in trace for words in CONSEQUENCES)
            found.append((1 if consequence else 0, float(when), f"rank {rank} raised:\n{trace.strip()}"))
        elif rank in hung:
            found.append((2, rank, f"rank {rank} was still running and was killed; it stood here:\n{stderr}"))
        elif code is not None:
            found.append((0, rank, f"rank {rank} died with exit code {code}:\n{stderr}"))
    head = f"of {len(codes)} ranks, {len(found)} failed"
    if len(hung) == len(found):
        head += f" to finish within {timeout:g} s"
    return "\n\n".join([head, *(text for *_, text in sorted(found))])


def _error(folder: Path, rank: int) -> str:
    """Time and traceback of a rank's failure; empty if it could not write them."""
    file = _file(folder, rank, "error")
    return file.read_text() if file.exists() else ""
