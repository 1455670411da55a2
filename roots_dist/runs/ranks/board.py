"""The place where ranks of a run that hangs say how they are: the store that they met at, and the run's folder.

    a rank --put--> store and folder --get, by name--> every other rank

Either may be why the run hangs, so that nobody waits for them longer than a moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from roots_dist.failures import write_if_possible
from roots_dist.runs.ranks.deadline import DeadlineExceeded, run_with_deadline
from roots_dist.runs.ranks.handshake import Identity, identity_of

T = TypeVar("T")

STORE_S = 0.5
DISK_S = 1.0
"""Seconds in which the disk of the run's folder has taken a report."""
PAUSE_S = 2.0
"""Seconds after a first late answer for which the store is not asked."""


class Board:
    """Texts by name that every rank can read: in the store, and in a folder as well, because the store may be gone, for
    all ranks or for the one that writes."""

    def __init__(self, store: Any, folder: Path):
        self.folder = folder
        self._store: Any = store
        self._answers = True
        """True if the last answer of the store came in time."""
        self._pause_s, self._asked_again = PAUSE_S, 0.0
        self._disk_answers = True

    def put(self, name: str, text: str) -> None:
        self._of_folder(lambda: write_if_possible(self.folder / f"{name}.json", text))
        if not self._ask(lambda store: store.set(f"hang/{name}", text.encode()) or True):
            self._asked_again = 0.0  # without a pause: a rank that has not said how it is would be taken for silent
            self._ask(lambda store: store.set(f"hang/{name}", text.encode()))

    def get(self, name: str) -> str | None:
        """The text, or None."""
        found = self._ask(lambda store: store.get(f"hang/{name}") if store.check([f"hang/{name}"]) else None)
        if found is not None:
            return bytes(found).decode()
        return self._of_folder(lambda: _text_of(self.folder / f"{name}.json"))

    def _of_folder(self, work: Callable[[], T]) -> T | None:
        """Do `work` on the folder's disk and return its result; None if the disk does not answer in time, and from then
        on: a disk that hangs may be the reason why the run does."""
        if not self._disk_answers:
            return None
        found, self._disk_answers = in_time(work)
        return found

    def identity(self, rank: int) -> Identity | None:
        found: Identity | None = self._ask(lambda store: identity_of(store, rank))
        return found

    def _ask(self, work: Callable[[Any], Any]) -> Any:
        """Ask the store and return its answer; None if it gives none.

        A host that is stopped or busy blocks its clients: it is asked again, over a new connection, after a pause that
        doubles each time, because each attempt may leave a thread that waits. A connection that breaks is the store's
        end.
        """
        if self._store is None or (not self._answers and time.monotonic() < self._asked_again):
            return None
        store, answers = self._store, self._answers
        try:
            self._store, found = run_with_deadline(STORE_S, lambda: _answer(store if answers else store.clone(), work))
        except DeadlineExceeded:
            self._answers, self._asked_again = False, time.monotonic() + self._pause_s
            self._pause_s *= 2
            return None
        except RuntimeError:
            self._store = None
            return None
        self._answers, self._pause_s = True, PAUSE_S
        return found


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def in_time(work: Callable[[], T]) -> tuple[T | None, bool]:
    """Do `work`; return its result, and True if it was done in time: a disk may never answer."""
    try:
        return run_with_deadline(DISK_S, work), True
    except DeadlineExceeded:
        return None, False


def _answer(store: Any, work: Callable[[Any], Any]) -> tuple[Any, Any]:
    return store, work(store)
