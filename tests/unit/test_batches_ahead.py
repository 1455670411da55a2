"""Batches that a thread makes while a step is computed: the same ones, in the same order, with the same errors."""

import threading
import time

import pytest
import torch

from roots_dist.learning.data.ahead import BatchesAhead
from roots_dist.world.batch import MicroBatch


def batch(step: int) -> list[MicroBatch]:
    return [MicroBatch(tokens=torch.full((1, 2), step), sample_ids=torch.tensor([step]), step=step)]


def test_the_next_batch_is_made_while_this_one_is_used_and_none_after_the_last():
    asked, begun = [], threading.Event()

    def make(step):
        asked.append((step, threading.current_thread() is threading.main_thread()))
        if step == 4:
            begun.set()
        return batch(step)

    made = BatchesAhead(make, last=4)
    assert made.at(3)[0].step == 3
    assert begun.wait(30)
    assert made.at(4)[0].step == 4
    assert asked == [(3, True), (4, False)]


def test_a_step_that_was_not_expected_is_made_at_once():
    made = BatchesAhead(batch, last=9)
    assert [made.at(step)[0].step for step in (0, 5, 6, 2)] == [0, 5, 6, 2]


def test_the_end_of_a_run_waits_for_what_is_being_made():
    """A thread that was in torch when Python ended aborted the process, whose run was done."""
    done = []

    def make(step):
        time.sleep(0.1 * step)
        done.append(step)
        return batch(step)

    made = BatchesAhead(make, last=9)
    made.close()
    made.at(0)
    made.close()
    assert done == [0, 1]


def test_a_failing_thread_raises_at_its_step():
    def make(step):
        if step == 1:
            raise OSError("a damaged file")
        return batch(step)

    made = BatchesAhead(make, last=9)
    made.at(0)
    with pytest.raises(OSError, match="a damaged file"):
        made.at(1)


def test_a_thread_that_hangs_keeps_no_process_alive():
    reading, release = threading.Event(), threading.Event()

    def make(step):
        if step == 1:
            reading.set()
            release.wait()
        return batch(step)

    BatchesAhead(make, last=9).at(0)
    assert reading.wait(30)
    (thread,) = (t for t in threading.enumerate() if t.name == "batches of step 2")
    assert thread.daemon
    release.set()
    thread.join(30)
