"""Deadlines for what may block forever: work runs on a thread of its own, and the wait for it ends.

A name server, a shared folder, a foreign server on our port or a collective can each block a call forever, and most of
them cannot be cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Unfinished
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


class DeadlineExceeded(Exception):
    """The work was not done in time. Its thread may still run, so the process must end with os._exit."""

    def __init__(self, seconds: float):
        super().__init__(f"not done after {seconds:g} s")


def run_with_deadline(seconds: float, work: Callable[[], T]) -> T:
    """Return `work()`, or raise what it raises. Raises DeadlineExceeded after `seconds`."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return done.result(timeout=seconds)
    except Unfinished:
        if done.done():  # the work itself raised a TimeoutError
            raise
        raise DeadlineExceeded(seconds) from None
