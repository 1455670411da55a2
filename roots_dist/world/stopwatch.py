"""The seconds of a step by part: a running stopwatch, and laps that assign the time since the last lap to a part.

    loop.py: lap("data")  executor.py: lap("compute"), lap("pp_wait")  step.py: lap("dp")
    parallel/tensor/collectives.py: lap("tp")  parallel/tensor/context.py: lap("cp")
    parallel/tensor/dispatch.py: lap("ep")
    --take--> runs/train/callbacks.py reports

There is one stopwatch per rank, created by assembly/ and passed on. A lap costs less than a microsecond. It reads the
clock of this process: on a GPU, which runs asynchronously, it shows when work was launched, not when it finished.
"""

from __future__ import annotations

import time

PARTS = ("compute", "tp", "cp", "ep", "pp_wait", "dp", "data")
"""Parts of a step: forward and backward; waiting for other tensor ranks; for other context ranks; for ranks with other
experts; for other stages (the pipeline bubble); work shared by data ranks (counts, reduction, optimizer); waiting for
the batch."""


class Stopwatch:
    """Accumulates seconds by part."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, what: str) -> None:
        """Add the time since the last lap to this part."""
        now = time.perf_counter()
        self._seconds[what] = self._seconds.get(what, 0.0) + now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call, and start a new lap."""
        seconds, self._seconds = self._seconds, {}
        self._since = time.perf_counter()
        return seconds
