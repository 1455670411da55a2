"""Graceful stop: SIGTERM and SIGUSR1 end a run after its current step, with a checkpoint, on all ranks together.

    launcher, Slurm, Kubernetes --signal--> StopSignal.signal --check_finite.py, in the message that it sends anyway-->
    all ranks: checkpoint, exit code 128 + signal; ended.txt in the run's folder says why, for scripts to read

A thread waits for the signals, because the main thread may be inside a collective for seconds.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roots_dist.failures import is_consequence, write_if_possible
from roots_dist.files import read_plain

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that launchers send to end a job, and that Slurm sends some time before its limit. Ctrl-C ends a run at
once."""
ENDED, ENDED_BEFORE = "ended.txt", "ended.before.txt"
FAILED, STOPPED, FINISHED = "failed", "stopped", "finished"
"""First word of ended.txt. The file does not exist while the run is active, nor after it was killed; what it said
before, if that was of a step, is in ended.before.txt."""
AFTER_STEP = re.compile(rf"({STOPPED}|{FINISHED}) .*after step [1-9]")


class StopSignal:
    """Signal that this process got; 0 if none so far."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def catch_stop_signals(folder: Path) -> Iterator[StopSignal]:
    """Catch the stop signals, so that they only set StopSignal.signal. If a rank of this run has failed, there is no
    next step, and a signal ends this rank at once. Does nothing outside the main thread, where Python handles no
    signals."""
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
        theirs.close()  # ends the thread
        waiter.join()
        ours.close()


def _wait(signals: socket.socket, stop: StopSignal, ended: Path) -> None:
    """Wait for signals: Python writes the number of each signal into the other end as soon as it arrives."""
    while received := signals.recv(1):
        if received[0] not in SIGNALS:
            continue
        if read_end(ended).startswith(FAILED):
            os._exit(128 + received[0])
        stop.signal = stop.signal or received[0]  # Slurm and torchrun may both send one: the first counts


@contextmanager
def record_failure(folder: Path, who: str, rank0: bool) -> Iterator[None]:
    """Write ended.txt if the body fails; only the first rank that fails by itself does. `who` is `rank 3 (pp0 dp0
    tp1)`."""
    if rank0 and AFTER_STEP.match(read_end(folder / ENDED)):
        (folder / ENDED).replace(folder / ENDED_BEFORE)  # runs/train/earlier_life.py reads it
    elif rank0:
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
    """First line of ended.txt; empty if there is no such file."""
    try:
        return read_plain(path).decode().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
