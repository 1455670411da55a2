"""How tests wait: long, since it costs nothing where all goes well and a busy machine needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

PATIENCE_S = 250
"""For whatever a test starts, before it gives up. Less than pytest's own limit."""


def alive(pid: int) -> bool:
    """A process that has ended may stay in the table until somebody asks how it ended: it is not alive."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def gone(pids: Iterable[int], within: float = PATIENCE_S) -> bool:
    """All of them have ended, or do so in time."""
    waited_for = list(pids)
    return comes_true(lambda: not any(map(alive, waited_for)), within)


def comes_true(condition: Callable[[], bool], within: float = PATIENCE_S) -> bool:
    """Whether it does, in time."""
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True
