"""Graceful stop: SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C end a run after its current step, with a checkpoint, on
all ranks together; before the first step, and on the second Ctrl-C or SIGQUIT, at once.

    launcher, Slurm, Kubernetes --a signal--> StopSignal.signal --check_finite.py, in the message that it sends anyway,
    and `agree` between steps--> all ranks: checkpoint, exit code 128 + signal
    ended.txt in the run's folder says why, for scripts to read

A thread waits for the signals, because the main thread may be inside a collective for seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from roots_dist.failures import is_consequence, write_if_possible
from roots_dist.files import read_plain
from roots_dist.storage.checkpoint.folder_lock import holder_of

if TYPE_CHECKING:
    from roots_dist.world.mesh import Mesh

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Signals that launchers send to end a job, that Slurm sends some time before its limit, that a terminal sends when it
is closed, and Ctrl-C."""
AT_ONCE = signal.SIGQUIT
ONE_PRESS_S = 0.5
"""Seconds in which another Ctrl-C is the same one: `timeout -s INT` sends it to the process and then to its group."""
END = 0
"""Number that no kernel sends: it ends the thread that waits."""
FOLDER_GONE = 128
"""Number that takes a signal's place in StopSignal if the run's folder has been removed."""
ENDED, ENDED_BEFORE = "ended.txt", "ended.before.txt"
FAILED, STOPPED, FINISHED = "failed", "stopped", "finished"
"""First word of ended.txt. The file does not exist while the run is active, nor after it was killed; what it said
before, if that was of a step, is in ended.before.txt."""
AFTER_STEP = re.compile(rf"({STOPPED}|{FINISHED}) .*after step [1-9]")


class StopSignal:
    """Signal that this process got, and what its run makes of it."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal; 0 if none so far."""
        self.agreed = 0
        """The signal for which all ranks stop; 0 if they go on."""
        self.began = False
        """True once there are steps that a checkpoint would save. Before, a signal ends the process at once."""

    def agree(self, mesh: Mesh) -> int:
        """Share the signals of all ranks; returns the one for which all stop, 0 if none. Collective over the world."""
        import torch

        if not self.agreed:
            told = torch.zeros(mesh.world.size, dtype=torch.int64, device=mesh.device)
            told[mesh.world.rank] = self.signal
            self.agreed = int(mesh.world.sum_(told).max())
        return self.agreed


@contextmanager
def catch_stop_signals(folder: Path) -> Iterator[StopSignal]:
    """Catch the stop signals, so that they only set StopSignal.signal once training has begun. If a rank of this run
    has failed, there is no next step, and a signal ends this rank at once. Signals that are ignored stay so (nohup).
    Does nothing outside the main thread, where Python handles no signals."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    heard = [number for number in (*SIGNALS, AT_ONCE) if signal.getsignal(number) is not signal.SIG_IGN]
    owner = os.getpid()

    def handle(number: int, _: object) -> None:
        if os.getpid() != owner:  # a process that this one has forked: it has no thread that waits
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in heard}
    fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    waiter = threading.Thread(target=_wait, args=(ours, stop, folder, heard), name="signals", daemon=True)
    waiter.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            theirs.send(bytes([END]))
        waiter.join()
        theirs.close()
        ours.close()


def _wait(signals: socket.socket, stop: StopSignal, folder: Path, heard: Sequence[int]) -> None:
    """Wait for signals: Python writes the number of each signal into the other end as soon as it arrives."""
    pressed: float | None = None
    while received := signals.recv(1):
        number = received[0]
        if number == END:
            return
        if number not in heard:
            continue
        if read_end(folder / ENDED).startswith(FAILED):
            os._exit(128 + number)
        again = number == signal.SIGINT and pressed is not None
        if again and pressed is not None and time.monotonic() < pressed + ONE_PRESS_S:
            continue
        if number == AT_ONCE or again or not stop.began:
            when = "before training" if not stop.began else "at once, without a checkpoint"
            record_own_end(folder, f"{STOPPED} by {signal.Signals(number).name} {when}")
            os._exit(128 + number)
        if number == signal.SIGHUP:
            _leave_the_terminal()
        if number == signal.SIGINT:
            pressed = time.monotonic()
            log.info(
                "Ctrl-C: the run stops after this step, with a checkpoint from which the same command goes on; "
                "Ctrl-C again ends it at once, without one"
            )
        stop.signal = stop.signal or number  # Slurm and torchrun may both send one: the first counts


def _leave_the_terminal() -> None:
    """Speak to nobody where a terminal has been closed: to write there fails, and a checkpoint is still to be saved."""
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            if os.isatty(fd):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def record_own_end(folder: Path, text: str) -> None:
    """Write ended.txt unless another process holds the folder, or may hold it because the lock cannot be read: it is
    that one's record then."""
    line, is_held = holder_of(folder)
    if is_held is False or line.startswith(f"process {os.getpid()} "):
        record_end(folder, text)


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
        if not is_consequence(error) and folder.is_dir() and not (folder / ENDED).exists():
            record_end(folder, f"{FAILED}: {who}, node {socket.gethostname()}: {_first_line(error)}")
        raise


def record_end(folder: Path, text: str) -> None:
    """Write ended.txt. A full disk is only said."""
    if not write_if_possible(folder / ENDED, f"{text}\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"):
        log.warning("%s cannot be written; it would say: %s", folder / ENDED, text)


def read_end(path: Path) -> str:
    """First line of ended.txt; empty if there is no such file."""
    try:
        return read_plain(path).decode().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
