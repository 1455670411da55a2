"""End ranks of our own launcher that hear no signal: torch elastic waits half a minute for them after a failure.

    a rank has been told to end, and is stopped --> SIGKILL at once
    a rank has failed, and another still runs GRACE_S later --> SIGKILL

A rank that was killed here is not taken for the cause of anything (failure_report.py).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOOK_S = 0.2
GRACE_S = 5.0
"""Seconds in which a rank ends that has seen another one fail."""
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


@contextmanager
def ending_deaf_ranks(records: Path) -> Iterator[dict[int, str]]:
    """Inside, watch the ranks that this process starts. `records` is where ranks say that they have failed. Yields the
    ranks that were killed, and why."""
    over, killed = threading.Event(), dict[int, str]()
    watcher = threading.Thread(target=_watch, args=(records, over, killed), name="deaf ranks", daemon=True)
    watcher.start()
    try:
        yield killed
    finally:
        over.set()
        watcher.join()


def _watch(records: Path, over: threading.Event, killed: dict[int, str]) -> None:
    failed: float | None = None
    while not over.wait(LOOK_S):
        if failed is None and any(records.glob("rank_*.json")):
            failed = time.monotonic()
        late = failed is not None and time.monotonic() - failed > GRACE_S
        for child in psutil.Process().children():
            with suppress(psutil.Error, OSError, KeyError, ValueError, TypeError):
                stopped = child.status() in STOPPED
                if child.status() != psutil.STATUS_ZOMBIE and (late or (stopped and _is_told_to_end(child.pid))):
                    rank = int(child.as_dict(["environ"])["environ"]["RANK"])
                    child.kill()
                    killed[rank] = "was stopped" if stopped else f"did not end within {GRACE_S:g} s"


def _is_told_to_end(pid: int) -> bool:
    """Whether a signal to end waits to be delivered. Linux only; elsewhere a stopped rank is ended after the grace."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, bits = line.partition(":")
            if name == "ShdPnd":
                return any(int(bits, 16) >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT))
    return False
