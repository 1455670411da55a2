"""End ranks of our own launcher that hear no signal, and what they have started: torch elastic waits half a minute for
the ones after a failure, and does not know the others.

    a rank has been told to end, and is stopped --> SIGKILL at once
    a rank has failed, and another still runs GRACE_S later --> SIGKILL
    the ranks have ended, and processes of theirs have not --> SIGTERM, and SIGKILL CHILDREN_GRACE_S later

A rank that was killed here is not taken for the cause of anything (failure_report.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOOK_S = 0.2
GRACE_S = 5.0
"""Seconds in which a rank ends that has seen another one fail."""
CHILDREN_GRACE_S = 2.0
"""Seconds in which a process ends that was started by a rank, after SIGTERM. One that was being forked may lose it."""
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


@dataclass
class WatchedRanks:
    """Ranks that this process has started."""

    killed: dict[int, str] = field(default_factory=dict)
    """Ranks that were killed, and why."""
    sessions: set[int] = field(default_factory=set)
    """Process ids of the ranks. torch elastic gives each a session of its own, which has the same number."""

    def end_children(self) -> None:
        """End what the ranks have started, after all of them have ended."""
        if not (left := self._children()):
            return
        for process in left:
            with suppress(psutil.Error):
                process.terminate()
        _, deaf = psutil.wait_procs(left, timeout=CHILDREN_GRACE_S)
        for process in deaf:
            with suppress(psutil.Error):
                process.kill()

    def _children(self) -> list[psutil.Process]:
        left = dict[psutil.Process, int]()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and (session := os.getsid(process.pid)) in self.sessions:
                    left[process] = session
        leaders = {process.pid for process in left} & self.sessions  # others, which have got the number of a rank
        return [process for process, session in left.items() if session not in leaders]


@contextmanager
def ending_deaf_ranks(records: Path) -> Iterator[WatchedRanks]:
    """Watch the ranks that this process starts while the body runs. `records` is where ranks say that they have
    failed."""
    over, watched = threading.Event(), WatchedRanks()
    watcher = threading.Thread(target=_watch, args=(records, over, watched), name="deaf ranks", daemon=True)
    watcher.start()
    try:
        yield watched
    finally:
        over.set()
        watcher.join()


def _watch(records: Path, over: threading.Event, watched: WatchedRanks) -> None:
    failed: float | None = None
    while not over.wait(LOOK_S):
        if failed is None and any(records.glob("rank_*.json")):
            failed = time.monotonic()
        late = failed is not None and time.monotonic() - failed > GRACE_S
        for child in psutil.Process().children():
            with suppress(psutil.Error, OSError, KeyError, ValueError, TypeError):
                if os.getsid(child.pid) == child.pid:
                    watched.sessions.add(child.pid)
                stopped = child.status() in STOPPED
                if child.status() != psutil.STATUS_ZOMBIE and (late or (stopped and _is_told_to_end(child.pid))):
                    rank = int(child.as_dict(["environ"])["environ"]["RANK"])
                    child.kill()
                    watched.killed[rank] = "was stopped" if stopped else f"did not end within {GRACE_S:g} s"


def _is_told_to_end(pid: int) -> bool:
    """True if a signal to end waits to be delivered. Linux only; elsewhere a stopped rank is ended after the grace."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, bits = line.partition(":")
            if name == "ShdPnd":
                return any(int(bits, 16) >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT))
    return False
