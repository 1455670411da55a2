"""The activity of this rank, in a form that another thread can read while the main thread waits: its step, its phase,
and the message that it waits for.

    loop.py, callbacks.py: step, during("save")   executor.py: waiting(...)   --> runs/ranks/watchdog.py

Collectives are not noted here: torch's flight recorder has them, DeepSpeed's too (runs/ranks/flight_recorder.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SAVING = "save of step"
"""Prefix of the name of a thread that saves while the main thread trains."""


@dataclass(frozen=True)
class Wait:
    """A message of another rank that this rank waits for."""

    operation: str
    group: str
    peer: int
    """Rank in the world that sends it, or is to receive it."""
    number: int
    """Number of messages that this rank has waited for in this group, this one included."""


@dataclass
class Progress:
    """The activity of one rank. Created by runs/ranks/join.py and passed on with the mesh."""

    phase: str = "init"
    """Work that the ranks do together: init, resume, step, evaluation, sample, save, end. Each may have its own
    timeout."""
    step: int = 0
    """The step that is being done, counted from 1; 0 before the first."""
    action: str = ""
    """Current computation of the pipeline executor, as `forward of stage 1, microbatch 3`."""
    wait: Wait | None = None
    on_hang: Callable[[str], None] = lambda text: None
    """Called with one line, on one rank, before the job ends because of a hang."""
    call_hang: Callable[[str], None] | None = None
    """Ends the job, with a name for what hangs: for a main thread that has found a hang by itself. None where nobody
    watches."""
    moved: float = field(default_factory=time.monotonic)
    """Monotonic time at which a save last wrote or read a part of its data, or its ranks last met."""
    _waits: dict[str, int] = field(default_factory=dict)

    def move(self) -> None:
        """Note that a save goes on."""
        self.moved = time.monotonic()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Set the phase of this rank while the body runs."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def waiting(self, operation: str, group: str, peer: int) -> Iterator[None]:
        """Note that this rank waits for a message while the body runs."""
        self._waits[group] = self._waits.get(group, 0) + 1
        self.wait = Wait(operation, group, peer, self._waits[group])
        try:
            yield
        finally:
            self.wait = None

    def __str__(self) -> str:
        where = f"step {self.step}, {self.phase}" if self.step and self.phase != "step" else self.phase
        where = f"step {self.step}" if self.phase == "step" else where
        return f"{where}, {self.action}" if self.action else where
