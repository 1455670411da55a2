"""Who is the cause of a hang, from what ranks say of themselves; and what the flight recorder's dumps say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist
from chaos.hangs import write_run
from commands import roots
from patience import comes_true

from roots_dist.cli.main import main
from roots_dist.failures import RankIdentity, Record
from roots_dist.layout import Layout
from roots_dist.runs.ranks import board, join, watchdog
from roots_dist.runs.ranks.deadline import DeadlineExceeded
from roots_dist.runs.ranks.end_deaf_ranks import ending_deaf_ranks
from roots_dist.runs.ranks.failure_report import summarize
from roots_dist.runs.ranks.flight_recorder import Operation, read_dump, read_dumps, record
from roots_dist.runs.ranks.handshake import Identity
from roots_dist.runs.ranks.hang import State, describe_hang, find_cause
from roots_dist.world.progress import Progress


def state(rank: int, **more: object) -> State:
    return State(rank, f"rank {rank} (node a)", "step 6", 10.0, at="x.py:7, f", **more)  # type: ignore[arg-type]


def waits(rank: int, number: int, ranks: list[int], group: str = "g") -> State:
    return state(
        rank, operation="all_reduce", group=group, title="tp0", number=number, ranks=ranks, begun={group: number}
    )


def test_a_rank_that_does_not_answer_is_the_cause_and_those_that_wait_for_it_are_not():
    states = {0: waits(0, 17, [0, 1]), 2: waits(2, 17, [2, 3], "h"), 3: waits(3, 17, [2, 3], "h")}
    states[2] = replace(states[2], operation="recv", is_message=True, ranks=[0])
    found = find_cause(states, 4)
    assert found.causes == (1,) and found.waits == {0: (1,), 2: (0,), 3: ()}
    text = describe_hang(found, states, {1: "rank 1 (node b) does not answer: it is stopped"})
    first, second, *_ = text.splitlines()
    assert first == "✗ hang in step 6: rank 1 (node b) does not answer: it is stopped"
    assert second == "    rank 0 (node a) has waited 10 s for rank 1 in all_reduce #17 of tp0 (ranks 0-1): step 6"


def test_a_rank_that_answers_and_waits_for_nobody_is_the_cause():
    states = {0: waits(0, 17, [0, 1]), 1: state(1, begun={"g": 16})}
    found = find_cause(states, 2)
    assert found.causes == (1,)
    assert describe_hang(found, states, {}).splitlines()[0] == (
        "✗ hang in step 6: rank 1 (node a) waits for no rank: step 6, at x.py:7, f"
    )


def test_ranks_in_different_operations_wait_for_each_other():
    states = {0: waits(0, 17, [0, 1], "g"), 1: waits(1, 5, [0, 1], "h")}
    found = find_cause(states, 2)
    assert found.causes == () and set(found.circle) == {0, 1}
    assert "ranks 0, 1 wait for each other" in describe_hang(found, states, {})


def test_an_operation_that_all_have_called_is_lost_by_the_network():
    states = {rank: waits(rank, 17, [0, 1]) for rank in range(2)}
    assert find_cause(states, 2).causes == () and "lost a message" in describe_hang(find_cause(states, 2), states, {})


def test_a_recorder_that_is_full_does_not_make_a_rank_late():
    states = {0: waits(0, 17, [0, 1]), 1: state(1, complete=False)}
    assert find_cause(states, 2).waits == {0: ()}


ENTRY = {
    "record_id": 0,
    "process_group": ["0", "default_pg"],
    "profiling_name": "nccl:all_reduce",
    "collective_seq_id": 1,
    "p2p_seq_id": 0,
    "is_p2p": False,
    "state": "completed",
    "retired": True,
}


@pytest.mark.parametrize("library", ["nccl", "gloo"])
def test_the_oldest_operation_that_is_not_finished_is_found_in_a_dump(library):
    """NCCL says how far each has come; gloo only whether it is over."""
    running = "started" if library == "nccl" else "scheduled"
    group = {"process_group": ["5", "tp0"], "profiling_name": f"{library}:reduce_scatter", "retired": False}
    entries = [
        ENTRY | group | {"record_id": 3, "collective_seq_id": 10, "state": "scheduled"},
        ENTRY | group | {"record_id": 2, "collective_seq_id": 9, "state": running},
        ENTRY,
        ENTRY | {"record_id": 1, "collective_seq_id": 2},
    ]
    found = read_dump({"entries": entries})
    assert found.pending == Operation("reduce_scatter", "5", "tp0", 9) and found.begun == {"0": 2, "5": 10}
    message = ENTRY | {"is_p2p": True, "p2p_seq_id": 4, "profiling_name": "nccl:recv 0<-1", "state": "started"}
    found = read_dump({"entries": [message | {"retired": False}]})
    assert found.pending == Operation("recv 0<-1", "0", "world", 4) and found.begun == {}
    assert read_dump({}).pending is None


@pytest.mark.parametrize("library", ["gloo", "nccl"])
def test_the_rank_that_does_not_come_is_found_in_recorded_dumps(library):
    """Dumps of three ranks that hang (record_dumps.py): 0 waits for rank 1 in tp0, 2 for both in the world."""
    folder, groups = Path(__file__).parents[1] / "golden" / "flight_recorder", {"tp0": [0, 1], "world": [0, 1, 2]}
    found = {rank: read_dump(json.loads((folder / f"{library}_rank_{rank}.json").read_text())) for rank in range(3)}
    states = {rank: state(rank, begun=dict(one.begun), complete=one.complete) for rank, one in found.items()}
    for rank, one in found.items():
        if (waits_in := one.pending) is not None:
            ranks = groups[waits_in.title]
            states[rank] = replace(states[rank], **vars(waits_in) | {"ranks": ranks})
    assert {rank: s.title for rank, s in states.items()} == {0: "tp0", 1: "", 2: "world"}
    found = find_cause(states, 3)
    assert found.causes == (1,) and found.waits == {0: (1,), 2: (0, 1)}
    assert "has waited 10 s for rank 1 in all_reduce #2 of tp0 (ranks 0-1)" in describe_hang(found, states, {})
    without = {rank: states[rank] for rank in (0, 2)}  # it does not answer at all
    assert find_cause(without, 3).causes == (1,)


def test_a_recorder_is_full_at_the_length_that_was_asked_for(monkeypatch):
    dump = {"entries": [ENTRY, ENTRY | {"record_id": 1, "collective_seq_id": 2}]}
    assert read_dump(dump).complete
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2")
    assert not read_dump(dump).complete


def test_the_recorder_of_gloo_is_read_in_a_torch_that_has_nccl_too(monkeypatch):
    """Alone under gloo; under NCCL beside its own, because the second threads of the ranks meet over gloo."""
    from torch._C import _distributed_c10d as c10d

    of_nccl = json.dumps({"entries": [ENTRY | {"process_group": ["1", "tp0"]}]})
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda **_: of_nccl, raising=False)
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", lambda **_: json.dumps({"entries": [ENTRY]}))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for backend, begun in {"gloo": {"0": 1}, "nccl": {"0": 1, "1": 1}}.items():
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        assert record().begun == begun


def test_progress_says_step_phase_and_action():
    progress = Progress()
    assert str(progress) == "init"
    progress.step, progress.phase, progress.action = 3, "step", "forward of stage 0, microbatch 1"
    with progress.during("save"), progress.waiting("recv", "forward up pp", 1):
        assert str(progress) == "step 3, save, forward of stage 0, microbatch 1"
        assert progress.wait is not None and progress.wait.number == 1
    assert progress.wait is None and str(progress).startswith("step 3, forward")


class Store:
    """A store in memory, and its clones: each item of `late` is one answer, and whether it comes too late."""

    def __init__(self, texts: dict[str, bytes], late: list[bool]):
        self.texts, self.late = texts, late

    def clone(self) -> Store:
        return Store(self.texts, self.late)

    def check(self, names: list[str]) -> bool:
        if self.late and self.late.pop(0):
            raise DeadlineExceeded(board.STORE_S)
        return all(name in self.texts for name in names)

    def get(self, name: str) -> bytes:
        return self.texts[name]

    def set(self, name: str, text: bytes) -> None:
        self.check([])
        self.texts[name] = text


@pytest.fixture
def no_clock(monkeypatch):
    """What is late is what the store in memory says, not what a busy machine does."""
    monkeypatch.setattr(board, "run_with_deadline", lambda seconds, work: work())


def test_a_rank_whose_store_answered_late_once_hears_and_is_heard(tmp_path, no_clock):
    texts: dict[str, bytes] = {}
    shown, other = watchdog.Board(Store(texts, [True]), tmp_path), watchdog.Board(Store(texts, []), tmp_path / "other")
    assert shown.get("called") is None  # too late
    shown.put("rank_0", "here")
    other.put("called", "1")
    assert other.get("rank_0") == "here" and shown.get("called") == "1"


def test_a_rank_that_has_lost_the_store_is_heard_in_the_folder(tmp_path, no_clock):
    texts: dict[str, bytes] = {}
    lost, other = watchdog.Board(Store(texts, [True] * 9), tmp_path), watchdog.Board(Store(texts, []), tmp_path)
    lost.put("rank_0", "here")
    assert "hang/rank_0" not in texts and other.get("rank_0") == "here"


def test_a_process_is_known_again_after_its_clock_was_set_and_another_is_not():
    own = Identity.own(0, "a")
    assert watchdog._process(replace(own, started=own.started - 0.7)) is not None
    assert watchdog._process(replace(own, started=own.started - 60)) is None


def test_a_watchdog_outlives_what_it_cannot_read(tmp_path, monkeypatch):
    """Between two lines of the main thread its frame has no line: the thread died, and the hang was never named."""
    code = SimpleNamespace(co_filename=__file__)
    assert not watchdog._waits(SimpleNamespace(f_code=code, f_lineno=None))
    who = RankIdentity(0, 2, folder=tmp_path)
    own = Identity(0, "here", os.getpid(), 0.0)
    limits, shown = {"step": 0.2}, watchdog.Board(Store({}, []), tmp_path / "board")
    watched = watchdog.Watchdog(who, Layout(dp=2), own, own, Progress(), limits, shown)
    seen, ended = iter([RuntimeError("half a frame"), *["one place"] * 99]), threading.Event()

    def place():
        found = next(seen)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(watched, "_place", place)
    monkeypatch.setattr(watched, "_end", ended.set)
    watched.start()
    assert ended.wait(30)
    watched.stop()


def without_a_long_end(words):
    """`roots WORDS`, whose longest timeout is that of the start."""
    with mock.patch.object(join, "CLOSING_S", 0):
        main(words)


@pytest.mark.full
def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path):
    """Slurm suspends jobs: torch's own timeouts, then half a minute longer than the watchdog's, ended it when it was
    woken."""
    metrics = tmp_path / "run" / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def suspend(pids):
        assert comes_true(lambda: lines() > 3)
        for number, pause in ((signal.SIGSTOP, 60), (signal.SIGCONT, 0)):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(pause)
        before = lines()
        assert comes_true(lambda: lines() > before + 3)
        os.kill(pids[0], signal.SIGTERM)

    words = ("train", str(write_run(tmp_path, 2)), "parallel.tp=2", "train.steps=1000000", "checkpoint.every=20")
    ran = roots(*words, "advanced.init_timeout_s=20", ranks=2, main=without_a_long_end, meanwhile=suspend)
    assert ran.returncode == 128 + signal.SIGTERM, ran.stderr


def test_a_hang_is_shown_as_it_is_and_our_own_kill_blames_nobody():
    whole = Record(0, "pp0", "a", 1.0, False, False, "✗ hang in step 6: rank 1", "", None, is_whole=True)
    assert summarize([whole], {0: 1, 1: -9}, 2).text == "✗ hang in step 6: rank 1"
    failed = Record(0, "pp0", "a", 1.0, False, False, "ValueError: x", "t", None)
    text = summarize([failed], {0: 1, 1: -9, 2: -15}, 3, {1: "was stopped"}).text
    assert "rank 1 was stopped, and was killed." in text and "memory" not in text and "rank 2 stopped" in text


def test_a_rank_that_is_stopped_when_it_is_told_to_end_is_killed_at_once(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}) for rank in range(2)]
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        with ending_deaf_ranks(tmp_path) as watched:
            time.sleep(0.5)
            assert not watched.killed  # a rank may be stopped by somebody who looks at it
            ranks[1].terminate()
            assert ranks[1].wait(timeout=20) == -signal.SIGKILL
        assert watched.killed == {1: "was stopped"} and ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_two_recorders_of_a_process_keep_their_own_order():
    """Each counts its own operations: together, by their numbers, the newer one was taken for the one that waits."""
    waits_in = {"retired": False, "state": "scheduled"}
    nccl = [ENTRY | {"record_id": n, "time_created_ns": 100 + n, "collective_seq_id": n + 1} for n in range(8)]
    nccl[7] |= waits_in
    gloo = [
        ENTRY | {"record_id": n, "time_created_ns": 200 + n, "process_group": ["3", "background"]} for n in range(3)
    ]
    gloo[2] |= waits_in | {"profiling_name": "gloo:broadcast", "collective_seq_id": 3}
    dumps = [{"entries": nccl}, {"entries": gloo}]
    assert read_dumps(dumps, background=True).pending == Operation("all_reduce", "0", "world", 8)
    assert read_dumps(dumps[::-1], background=True).pending == Operation("all_reduce", "0", "world", 8)
    nccl[7] |= {"retired": True}
    assert read_dumps(dumps, background=True).pending == Operation("broadcast", "3", "background", 3)
    assert read_dumps(dumps).pending is None and read_dumps(dumps).begun == {"0": 8, "3": 3}


def test_a_disk_that_takes_no_report_does_not_hold_the_end_back(tmp_path, monkeypatch):
    """The disk on which a save hangs is that of the run's folder: a report that waited for it never ended the run."""
    texts, never = {}, threading.Event()
    monkeypatch.setattr(board, "DISK_S", 0.1)
    monkeypatch.setattr(board, "write_if_possible", lambda *_: never.wait(60))
    shown, other = watchdog.Board(Store(texts, []), tmp_path), watchdog.Board(Store(texts, []), tmp_path / "other")
    began = time.monotonic()
    shown.put("called", "a")
    shown.put("reported", "b")
    assert other.get("called") == "a" and other.get("reported") == "b" and shown.get("nothing") is None
    assert time.monotonic() - began < 5
    never.set()
