"""Where the seconds of a step go: a watch that always runs, and laps that say what the time since the last one went to.

    loop.py: lap("data")  executor.py: lap("compute"), lap("pp_wait")  collectives.py: lap("tp")  step.py: lap("dp")
    --take--> duties.py reports

One watch per rank, made by assembly/run.py and handed on. A lap costs less than a microsecond. It reads the clock of
this process: on a GPU, which works on while Python goes ahead, it says when work was handed over, not when it was done.
"""

from __future__ import annotations

import time

PARTS = ("compute", "tp", "pp_wait", "dp", "data")
"""What a step consists of: forward and backward; waiting there for the other tensor ranks; waiting for the other
stages, which is the pipeline's bubble; what data ranks have in common (counts, reduction, optimizer); making the
batch."""


class Stopwatch:
    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, what: str) -> None:
        """The time since the last lap went to this."""
        now = time.perf_counter()
        self._seconds[what] = self._seconds.get(what, 0.0) + now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Seconds by what they went to since the last take. A new lap begins."""
        seconds, self._seconds = self._seconds, {}
        self._since = time.perf_counter()
        return seconds
