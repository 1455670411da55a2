"""A tracker in the background: whatever it does, the run neither waits for it nor ends with it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from patience import PATIENCE_S

from roots_dist.runs.track.background import Background


class Slow:
    """Takes nothing before it is let go; raises where it is told to."""

    def __init__(self, go: threading.Event, fail_at: int | None = None):
        self.go, self.fail_at, self.taken, self.closed = go, fail_at, [], False

    def log(self, step, metrics):
        self.go.wait()
        if step == self.fail_at:
            raise ConnectionError("gone\nfor good")
        self.taken.append((step, dict(metrics)))

    def text(self, step, name, text):
        self.taken.append((step, name, text))

    def checkpoint(self, step, path):
        self.taken.append((step, path))

    def close(self):
        self.closed = True


@pytest.fixture
def go():
    event = threading.Event()
    yield event
    event.set()  # no thread outlives its test


def test_all_arrives_in_order_and_is_closed(go):
    slow = Slow(go)
    tracker = Background("Slow", lambda: slow)
    metrics = {"loss/train": 1.0}
    tracker.log(1, metrics)
    metrics["loss/train"] = 2.0  # the caller's own from here on
    tracker.text(1, "sample", "x")
    tracker.checkpoint(1, Path("c"))
    go.set()
    tracker.close()
    assert slow.taken == [(1, {"loss/train": 1.0}), (1, "sample", "x"), (1, Path("c"))] and slow.closed


def test_what_a_slow_one_cannot_take_is_dropped_with_one_warning_and_the_run_goes_on(go, caplog):
    slow = Slow(go)
    tracker = Background("Slow", lambda: slow, room=50)
    start = time.perf_counter()
    for step in range(5000):
        tracker.log(step, {"loss/train": 1.0})
    assert time.perf_counter() - start < PATIENCE_S
    assert [r.getMessage() for r in caplog.records] == [
        "Slow is slower than the run: calls that do not fit its queue are dropped"
    ]
    go.set()
    tracker.close()
    steps = [step for step, _ in slow.taken]
    assert (
        steps[:50] == list(range(50)) and 50 <= len(steps) <= 52 and slow.closed
    )  # two more, whenever it takes its first ones
    assert steps == sorted(steps)
    assert caplog.records[-1].getMessage() == f"Slow: {5000 - len(steps)} calls were dropped"


def test_one_that_never_answers_is_left_behind_at_the_end(go, caplog):
    tracker = Background("Slow", lambda: Slow(go), close_s=0.2)
    tracker.log(1, {})
    start = time.perf_counter()
    tracker.close()
    assert 0.2 <= time.perf_counter() - start < PATIENCE_S
    assert [r.getMessage() for r in caplog.records] == ["Slow did not take all calls within 0.2 s and is abandoned"]


def test_one_that_never_opens_keeps_nobody_waiting(go, caplog):
    start = time.perf_counter()
    tracker = Background("Slow", lambda: go.wait() and None, close_s=0.1)
    tracker.log(1, {})
    tracker.close()
    assert time.perf_counter() - start < PATIENCE_S


def test_a_failure_is_said_once_and_ends_it(go, caplog):
    slow = Slow(go, fail_at=2)
    go.set()
    tracker = Background("Slow", lambda: slow)
    for step in range(1, 2000):
        tracker.log(step, {})
        time.sleep(0.001 if step < 100 else 0)
    tracker.close()
    assert slow.taken == [(1, {})] and not slow.closed
    assert [r.getMessage() for r in caplog.records] == ["Slow is disabled from here on: gone"]


def test_none_to_be_had_is_no_failure(caplog):
    tracker = Background("None", lambda: None)
    tracker.log(1, {})
    tracker.close()
    assert not caplog.records
