"""How late a machine is: what it takes beyond the seconds that were asked for, measured beside a trial. A limit in
seconds would call a crowded machine a fault of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TICK_S = 0.05
SHARE = 2.0
"""Seconds that a process with several threads may take for each second by which one thread is late."""


class Lateness:
    """Measured by a thread that sleeps, and notes by how much it wakes too late."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._over = threading.Event()

    def measure(self) -> None:
        while not self._over.is_set():
            before = time.time()
            time.sleep(TICK_S)
            sum(range(20_000))  # a thread that only sleeps is served first
            self._late.append((time.time(), max(0.0, time.time() - before - TICK_S)))

    def allowance(self, since: float) -> float:
        """Seconds to add to a limit that began at this time (of time.time)."""
        return SHARE * sum(late for when, late in self._late if when >= since)


@contextmanager
def lateness() -> Iterator[Lateness]:
    """Measure while the body runs."""
    found = Lateness()
    thread = threading.Thread(target=found.measure, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found._over.set()
        thread.join()
