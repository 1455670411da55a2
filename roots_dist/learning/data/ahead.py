"""The batch of the next step, made while this one is computed.

    step --BatchesAhead.at--> [MicroBatch] of the step, and a thread begins those of the next

A batch is a function of its step, so that nothing is lost when a run stops, and nothing is to be saved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from roots_dist.world.batch import MicroBatch

CLOSING_S = 5.0
"""Seconds for which the end of a run waits for batches that nobody will use: a file system may hang."""


class BatchesAhead:
    """Steps may be asked for in any order; only those that follow one another come without waiting."""

    def __init__(self, make: Callable[[int], list[MicroBatch]], last: int, *, pinned: bool = False):
        """make: the microbatches of a step. last: the last step of the run, after which none is made. pinned: they are
        put into page-locked memory, for a GPU."""
        self._make, self._last, self._pinned = make, last, pinned
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def at(self, step: int) -> list[MicroBatch]:
        """The microbatches of a step. An error that making them raised in the thread is raised here."""
        begun, self._next = self._next, None
        batches = begun[1].result() if begun and begun[0] == step else self._made(step)
        if step < self._last:
            self._next = step + 1, _begin(self._made, step + 1)
        return batches

    def close(self) -> None:
        """Wait for the batches that are being made, but no longer than CLOSING_S: a thread that is outside of Python
        when the process ends aborts it."""
        if self._next is not None:
            wait([self._next[1]], CLOSING_S)

    def _made(self, step: int) -> list[MicroBatch]:
        batches = self._make(step)
        return [batch.pinned() for batch in batches] if self._pinned else batches


def _begin(make: Callable[[int], list[MicroBatch]], step: int) -> Future[list[MicroBatch]]:
    """Make a step's batches in a thread."""
    future: Future[list[MicroBatch]] = Future()

    def work() -> None:
        try:
            future.set_result(make(step))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=f"batches of step {step + 1}", daemon=True).start()
    return future
