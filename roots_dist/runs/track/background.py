"""A tracker that runs on a thread of its own, so that training never waits for it.

    log, text, checkpoint --queue of ROOM calls--> thread: open the tracker, pass the calls on, close it

The thread also opens the tracker, so a server that does not answer does not delay the run. If the tracker is slower
than the run, calls that do not fit the queue are dropped, with one warning and a count at the end; metrics.jsonl has
them all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue

from roots_dist.runs.track.tracker import Tracker
from roots_dist.storage.checkpoint.object_store import Place

log = logging.getLogger(__name__)

ROOM = 1000
CLOSE_S = 30.0
"""Seconds for which the end of a run waits for a tracker that lags behind."""


class Background:
    """A tracker. `open_tracker` returns the wrapped one, or None if there is none."""

    def __init__(
        self, name: str, open_tracker: Callable[[], Tracker | None], room: int = ROOM, close_s: float = CLOSE_S
    ):
        self._name, self._open, self._room, self._close_s = name, open_tracker, room, close_s
        self._queue: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._dropped = 0
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = dict(metrics)
        self._put(lambda tracker: tracker.log(step, numbers))

    def text(self, step: int, name: str, text: str) -> None:
        self._put(lambda tracker: tracker.text(step, name, text))

    def checkpoint(self, step: int, path: Place) -> None:
        self._put(lambda tracker: tracker.checkpoint(step, path))

    def _put(self, do: Callable[[Tracker], None]) -> None:
        if self._off.is_set():
            return
        if self._queue.qsize() < self._room:
            self._queue.put(do)
            return
        if not self._dropped:
            log.warning("%s is slower than the run: calls that do not fit its queue are dropped", self._name)
        self._dropped += 1

    def close(self) -> None:
        """Wait up to close_s seconds for the calls in the queue."""
        self._queue.put(None)
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            log.warning("%s did not take all calls within %g s and is abandoned", self._name, self._close_s)
        if self._dropped:
            log.warning("%s: %d calls were dropped", self._name, self._dropped)

    def _work(self) -> None:
        try:
            tracker = self._open()
            if tracker is None:
                return
            while do := self._queue.get():
                do(tracker)
            tracker.close()
        except Exception as error:  # trackers raise many kinds; none of them is worth a training run
            log.warning("%s is disabled from here on: %s", self._name, first_line(error))
        finally:
            self._off.set()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
