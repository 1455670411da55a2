"""Rounds of checks over the world's store: every rank writes what it measured, and rank 0 collects it.

    every rank: run_round(name, work) --as JSON--> store --> rank 0: answers, or who is silent --go | stop--> every rank

JSON over the store replaces collectives: it works before any group exists and with a dead rank, and unpickles nothing.
Each round is a barrier, so that no rank measures while another still does something else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from roots_dist.cluster_profile import Finding, format_ranks
from roots_dist.errors import EnvironmentProblem
from roots_dist.runs.ranks.deadline import DeadlineExceeded, run_with_deadline

PAUSES_S = (0.002, 0.1)
"""Seconds between two polls of the store: at first, and after a while without an answer (hundreds of ranks poll one
server)."""
SLACK_S = 5.0
"""Extra seconds, because ranks reach a round at different times, and rank 0 answers when it has all results."""
BYE_S = 2.0
FIX = "read that rank's log, and check that its host is up"


class RoundStopped(Exception):
    """A rank failed or is silent, so all ranks stop. Rank 0 has the findings."""


class Coordinator:
    """One rank's part in the rounds. `answers` and `findings` are filled on rank 0 only."""

    def __init__(self, store: Any, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self.answers: dict[str, dict[int, Any]] = {}
        """Round -> rank -> its answer."""
        self.findings: list[Finding] = []
        self.hosts: dict[int, str] = {}
        """Rank -> host, for ranks whose host is known."""
        self.thread_is_stuck = False
        """True if a thread of this process still works on something overdue."""

    def run_round(
        self, round: str, seconds: float, work: Callable[[], Any], silence: str = "", fix: str = FIX
    ) -> dict[int, Any]:
        """Run `work` on every rank for at most `seconds`. Returns all answers on rank 0, nothing on the others.

        Raises RoundStopped on every rank if one raised, was overdue or is silent; rank 0 keeps one finding for each
        kind, with `silence` as the text for silent ranks. Raises EnvironmentProblem if rank 0 itself is silent.
        """
        end = time.monotonic() + seconds + SLACK_S
        self._set(f"{round}/{self.rank}", self._answer(seconds, work))
        if self.rank != 0:
            if self._get(f"{round}/word", seconds + 2 * SLACK_S) != "go":
                raise RoundStopped
            return {}
        answers = self._collect(round, end - time.monotonic())
        self.answers[round] = {rank: answer["answer"] for rank, answer in answers.items() if "answer" in answer}
        silent = Finding(
            check="answers",
            where="",
            found=silence or f"no answer in round {round}",
            expected=f"an answer within {seconds + SLACK_S:g} s",
            fix=fix if silence else FIX,
        )
        self._note_failures(round, answers, silent, fix)
        complete = len(self.answers[round]) == self.size
        self._set(f"{round}/word", "go" if complete else "stop")
        if not complete:
            raise RoundStopped
        return self.answers[round]

    def broadcast(self, what: str, value: Any = None, seconds: float = 2 * SLACK_S) -> Any:
        """Send rank 0's value to every rank. Raises EnvironmentProblem if rank 0 does not answer."""
        if self.rank == 0:
            self._set(what, value)
            return value
        return self._get(what, seconds)

    def leave(self) -> None:
        """Leave the rounds. Rank 0 leaves last, because the store ends with it."""
        self.store.set(f"bye/{self.rank}", b"-")
        if self.rank == 0:
            self._wait_for_keys([f"bye/{rank}" for rank in range(self.size)], BYE_S)

    def _answer(self, seconds: float, work: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"answer": run_with_deadline(seconds, work)}
        except DeadlineExceeded as error:
            self.thread_is_stuck = True
            return {"error": str(error)}
        except Exception as error:  # a broken cluster makes libraries raise anything
            lines = str(error).strip().splitlines() or ["no reason given"]
            return {"error": f"{type(error).__name__}: {lines[0]}"}

    def _note_failures(self, round: str, answers: dict[int, dict[str, Any]], silent: Finding, fix: str) -> None:
        """Add findings, silent ranks first, because they may be why others failed."""
        errors: dict[str, list[int]] = {}
        for rank, answer in answers.items():
            if "error" in answer:
                errors.setdefault(f"{round}: {answer['error']}", []).append(rank)
        if missing := [rank for rank in range(self.size) if rank not in answers]:
            self.findings.append(replace(silent, where=format_ranks(missing, self.hosts)))
        for found, ranks in errors.items():
            where = format_ranks(ranks, self.hosts)
            self.findings.append(Finding(check="answers", where=where, found=found, expected="no error", fix=fix))

    def _collect(self, round: str, seconds: float) -> dict[int, dict[str, Any]]:
        keys = {rank: f"{round}/{rank}" for rank in range(self.size)}
        if not self._wait_for_keys(keys.values(), seconds):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items()}

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value).encode())

    def _get(self, key: str, seconds: float) -> Any:
        why = f"within {seconds:g} s"
        try:
            if self._wait_for_keys([key], seconds):
                return json.loads(self.store.get(key))
        except RuntimeError:  # torch's DistNetworkError
            why = "and its store is gone"
        word = key.partition("/")[0]
        raise EnvironmentProblem(
            f"{format_ranks([0], self.hosts)} = silent: expected its answer in round {word}, {why}. Fix: {FIX}."
        )

    def _wait_for_keys(self, keys: Iterable[str], seconds: float) -> bool:
        """Poll until the keys exist. A wait that times out would make torch's store complain on stderr."""
        keys, end = list(keys), time.monotonic() + seconds
        pause, longest = PAUSES_S
        while not self.store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return True
