"""Told to stop: SIGTERM and SIGUSR1 end a run at its next step's border, with a checkpoint, on all ranks together.

    launcher, Slurm, Kubernetes --signal--> Stop.signal
        --train/finite.py, one number of a message that is sent anyway-->
    all ranks: checkpoint, exit code 128 + signal; ended.txt in the run's folder says why, for scripts to read

A thread waits for the signals, since the main one may be deep in a collective for seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roots_dist.failures import is_consequence, write_if_possible

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""How launchers end a job; what Slurm is told to send some time before its limit. Ctrl-C ends a run at once, as
ever."""
ENDED = "ended.txt"
FAILED, STOPPED, FINISHED = "failed", "stopped", "finished"
"""The first words of ended.txt. It is gone while the run is at work; no file at all: it was killed."""


class StopSignal:
    """signal: which one this process got; 0: none so far."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def catch_stop_signals(folder: Path) -> Iterator[StopSignal]:
    """From here on the signals end nothing by themselves, unless a rank of this run has failed: then there is no next
    step, and this rank is gone at once. Does nothing outside the main thread, where Python takes no signals."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    waiter = threading.Thread(target=_wait, args=(ours, stop, folder / ENDED), name="signals", daemon=True)
    waiter.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()  # which ends the thread
        waiter.join()
        ours.close()


def _wait(signals: socket.socket, stop: StopSignal, ended: Path) -> None:
    """Python writes the number of each signal into the other end as soon as it comes."""
    while came := signals.recv(1):
        if came[0] not in SIGNALS:
            continue
        if read_end(ended).startswith(FAILED):
            os._exit(128 + came[0])
        stop.signal = stop.signal or came[0]  # Slurm and torchrun may both tell: the second says nothing new


@contextmanager
def record_failure(folder: Path, who: str, rank0: bool) -> Iterator[None]:
    """A failure inside is written down by the rank whose own it is, the first of them. who: `rank 3 (pp0 dp0 tp1)`."""
    if rank0:
        (folder / ENDED).unlink(missing_ok=True)
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not is_consequence(error) and not (folder / ENDED).exists():
            record_end(folder, f"{FAILED}: {who}, node {socket.gethostname()}: {_first_line(error)}")
        raise


def record_end(folder: Path, text: str) -> None:
    write_if_possible(folder / ENDED, f"{text}\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")


def read_end(path: Path) -> str:
    """The line of ended.txt; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
