"""Nothing that the doctor does may hang: work on a thread of its own, and an end to waiting for it.

A name server, a shared folder, a foreign server on our port or a collective can each keep a call for ever, and most of
them cannot be told to give up.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Unfinished
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


class DeadlineExceeded(Exception):
    """The work was not done in time. Its thread may still be at it, so the process is to end by os._exit."""

    def __init__(self, seconds: float):
        super().__init__(f"not done after {seconds:g} s")


def run_with_deadline(seconds: float, work: Callable[[], T]) -> T:
    """`work()`, with what it raises. Raises Overdue when `seconds` are over."""
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
