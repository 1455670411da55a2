"""The watchdog of a rank: a thread that sees when nothing moves any more, and names the cause before the job ends.

    main thread waits longer than its phase may --"a hang"--> board --> every rank that lives: its state and stacks
    --> the lowest of them: find_cause (hang.py), errors/hang.txt, the record of the end, the launcher's record
    --> all: kill the silent ranks of this machine, which hear no other signal, and exit

The board is the store that the ranks met at, and the run's folder as well (the store's host may be the rank that
hangs). Nothing is written to it before a hang; each rank asks it once or twice a second whether one has been found.
The timeouts of the process groups themselves are longer, and act only if this thread cannot.
"""

from __future__ import annotations

import json
import linecache
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from roots_dist.failures import ERRORS, FAILURE, RankIdentity, end_at_once, report, write_if_possible
from roots_dist.layout import Layout
from roots_dist.runs.ranks import flight_recorder
from roots_dist.runs.ranks.board import Board, in_time
from roots_dist.runs.ranks.handshake import Identity, identity_of, started_at
from roots_dist.runs.ranks.hang import State, describe_hang, find_cause
from roots_dist.world.progress import SAVING, Progress

log = logging.getLogger(__name__)

TICK_S = 0.25
CLOSING_S = 5.0
"""Seconds for which the end of a run waits for the watchdog's last question."""
ASKED_PER_S = 16384
"""Questions that the store answers in a second: larger worlds ask less often."""
ANSWER_S = 0.5
"""Seconds, besides two ticks, in which a rank that lives has said how it is."""
TELL_S = 4.0
"""Seconds in which the lowest rank has written what was found."""
SAME_S = 5.0
"""Seconds by which two readings of when a process started may differ: the clock may be set between the two of which
each is made, and the number of a process is not given again so soon."""
MARGIN_S = 3600
"""Seconds by which the timeouts of process groups are longer than the watchdog's: their clock goes on while a whole job
is stopped, as when Slurm suspends it."""
STATES = {
    psutil.STATUS_STOPPED: "it is stopped (SIGSTOP, or a debugger)",
    psutil.STATUS_TRACING_STOP: "it is stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "it waits for a disk or a device",
    psutil.STATUS_ZOMBIE: "it has ended",
}


@dataclass
class Watchdog:
    """Watches one rank. `start` and `stop` are called by runs/ranks/join.py."""

    who: RankIdentity
    layout: Layout
    own: Identity
    first: Identity
    """Rank 0, whose store may be gone."""
    progress: Progress
    limits: Mapping[str, float]
    """Phase -> seconds that a rank may wait in it; `step` for those that are not named."""
    board: Board
    """Board on which ranks report their state."""

    def __post_init__(self) -> None:
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._over = threading.Event()
        self._called = threading.Event()
        self._key: object = None
        self._seconds = 0.0
        self._tick = max(min(TICK_S, min(self.limits.values()) / 8), self.who.size / ASKED_PER_S)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the watch, and wait for what it asks the store just now: a thread that is outside of Python when the
        process ends aborts it. No longer than CLOSING_S, because the store may be gone."""
        self._over.set()
        self._thread.join(CLOSING_S)

    def call_hang(self, text: str) -> None:
        """End the job, because the main thread has found that something hangs. `text` is what it knows; the ranks
        together find out more."""
        log.debug("%s", text)
        self._called.set()

    @property
    def limit(self) -> float:
        return self.limits.get(self.progress.phase, self.limits["step"])

    @property
    def _waits_for_save(self) -> bool:
        """True if the main thread saves, or waits for the thread that does: then the operation in which that thread
        waits counts."""
        return self.progress.phase == "save"

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            try:
                self._count(min(now - before, 2 * self._tick))  # a machine that was asleep has not waited
            except Exception:  # the main thread goes on meanwhile, and may be seen between two states: look again
                log.debug("the watchdog could not see where the main thread is", exc_info=True)
            before = now
            if self._seconds >= self.limit or self._called.is_set():
                self.board.put("called", json.dumps({"rank": self.who.rank}))
                self._end()
            elif self.board.get("called") is not None and not self._over.is_set():
                self._end()

    def _count(self, seconds: float) -> None:
        """Add to the time for which the main thread has waited in one and the same place."""
        key = self._place()
        self._seconds = self._seconds + seconds if key is not None and key == self._key else 0.0
        self._key = key

    def _place(self) -> object:
        """The place where the main thread waits: a message, a collective, or a function of torch.distributed; None if
        it computes."""
        if self.progress.wait is not None:
            return self.progress.wait
        if (operation := flight_recorder.pending(self._waits_for_save)) is not None:
            return operation
        frame = self._frame()
        if frame is not None and _waits(frame):
            return id(frame), frame.f_lasti
        return None

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main or 0)

    def _at(self) -> str:
        """Position of this rank in the code: of its main thread, or of the thread that saves, if the main one waits for
        it."""
        savers = [thread.ident for thread in threading.enumerate() if thread.name.startswith(SAVING)]
        frames = sys._current_frames()
        return _where(frames.get(savers[-1] or 0) if savers and self._waits_for_save else self._frame())

    def _end(self) -> None:
        """Say how this rank is, let the lowest rank say what has happened, and end."""
        try:
            self.board.put(f"rank_{self.who.rank}", json.dumps(asdict(self.state())))
            time.sleep(ANSWER_S + 2 * self._tick)
            if any(self.board.get(f"rank_{rank}") is not None for rank in range(self.who.rank)):
                report(self.who, "a rank of this run hangs", consequence=True)
                end = time.monotonic() + TELL_S
                while self.board.get("reported") is None and time.monotonic() < end:
                    time.sleep(0.05)
            else:
                self._report_hang()
            for other in json.loads(self.board.get("reported") or "[]"):
                _kill(Identity(**other), self.own)
        except Exception:  # whatever fails here, the job must end
            report(self.who, f"a rank of this run hangs, and it was not found out which:\n{traceback.format_exc()}")
        end_at_once(FAILURE)

    def state(self) -> State:
        """Current state of this rank."""
        found = flight_recorder.record(self._waits_for_save)
        wait, operation, frame = self.progress.wait, found.pending, self._frame()
        state = State(
            rank=self.who.rank,
            name=_name(self.who.rank, str(self.layout.place(self.who.rank)), self.own),
            doing=str(self.progress),
            seconds=self._seconds,
            begun=dict(found.begun),
            complete=found.complete,
            at=self._at(),
            stacks=_stacks(),
        )
        if wait is not None:
            message = replace(state, operation=wait.operation, title=wait.group, number=wait.number)
            return replace(message, ranks=[wait.peer], is_message=True)
        if operation is not None:
            group = replace(state, group=operation.group, title=operation.title, number=operation.number)
            ranks = flight_recorder.members().get(operation.group, [])
            return replace(group, operation=operation.operation, ranks=ranks)
        if frame is not None and _waits(frame):
            return replace(state, operation=frame.f_code.co_name)
        return state

    def _report_hang(self) -> None:
        texts = {rank: self.board.get(f"rank_{rank}") for rank in range(self.who.size)}
        states = {rank: State(**json.loads(text)) for rank, text in texts.items() if text is not None}
        found = find_cause(states, self.who.size)
        missing = {rank: self._identity(rank) for rank in found.causes if rank not in states}
        silent = {rank: self._of_silent(rank, who) for rank, who in missing.items()}
        text = describe_hang(found, states, silent)
        folder = self.who.folder or self.board.folder
        stacks = "\n\n".join(f"{state.name}, in {state.doing}:\n{state.stacks}" for state in states.values())
        path = folder / ERRORS / "hang.txt"
        if in_time(lambda: write_if_possible(path, f"{text}\n\n{stacks}\n"))[0]:
            text += f"\n  stacks of the ranks that answer: {path}"
        in_time(lambda: self.progress.on_hang(text.splitlines()[0].removeprefix("✗ ")))
        report(self.who, text)
        self.board.put("reported", json.dumps([asdict(who) for who in missing.values() if who is not None]))

    def _identity(self, rank: int) -> Identity | None:
        return self.first if rank == 0 else self.board.identity(rank)

    def _of_silent(self, rank: int, who: Identity | None) -> str:
        """Name of a rank that does not answer, and how its process is."""
        name = _name(rank, str(self.layout.place(rank)), who)
        if who is None or who.host != self.own.host:
            return f"{name} does not answer"
        process = _process(who)
        if process is None:
            return f"{name} does not answer: it has ended"
        return f"{name} does not answer: {STATES.get(process.status(), 'it runs, and its interpreter does not')}"


def watch(who: RankIdentity, store: Any, layout: Layout, progress: Progress, limits: Mapping[str, float]) -> Watchdog:
    """Start to watch this rank, from the handshake on."""
    own, first = identity_of(store, who.rank), identity_of(store, 0)
    folder = who.records or (who.folder or Path(tempfile.gettempdir())) / ERRORS
    board = Board(store.clone(), folder / f"hang-{first.started:.0f}-{first.pid}")
    watchdog = Watchdog(who, layout, own, first, progress, limits, board)
    watchdog.start()
    progress.call_hang = watchdog.call_hang
    return watchdog


def end_alone(who: RankIdentity, progress: Progress, text: str) -> None:
    """End a run of one process, whose main thread has found that something hangs."""
    told = f"✗ hang in {progress}: {text}"
    if who.folder is not None:
        path, stacks = who.folder / ERRORS / "hang.txt", _stacks()
        if in_time(lambda: write_if_possible(path, f"{told}\n\n{stacks}\n"))[0]:
            told += f"\n  stacks: {path}"
    in_time(lambda: progress.on_hang(told.splitlines()[0].removeprefix("✗ ")))
    report(who, told)
    end_at_once(FAILURE)


def group_timeout(limits: Mapping[str, float]) -> timedelta:
    """Timeout of the process groups: longer than any of the watchdog's."""
    return timedelta(seconds=max(limits.values()) + MARGIN_S)


def _name(rank: int, place: str, who: Identity | None) -> str:
    parts = [place, *((f"node {who.host}", f"process {who.pid}") if who else ())]
    return f"rank {rank} ({', '.join(part for part in parts if part)})"


def _process(who: Identity) -> psutil.Process | None:
    """The process, if it is still that one."""
    with suppress(psutil.Error):
        process = psutil.Process(who.pid)
        if abs(started_at(process) - who.started) < SAME_S:
            return process
    return None


def _kill(who: Identity, own: Identity) -> None:
    """Kill a silent rank of this machine: a stopped process hears no other signal."""
    if who.host == own.host and (process := _process(who)) is not None:
        with suppress(psutil.Error):
            process.kill()


def _waits(frame: FrameType) -> bool:
    """True if a main thread that stands here waits for other ranks."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)  # None between two lines
    return f"torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename or ".wait(" in line


def _where(frame: FrameType | None) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}" if frame else ""


def _stacks() -> str:
    """Stacks of all threads of this process but this one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    mine = threading.get_ident()
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != mine
    )
