"""The launcher, with real processes: what goes wrong on one rank ends all within seconds, and leaves nobody behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from commands import environ
from commands import start as start_fork
from patience import PATIENCE_S, alive, comes_true, gone

from roots_dist.runs.ranks.local import launch

RANKS = Path(__file__).with_name("ranks.py")
UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")


def launching(words: Sequence[str]) -> None:
    """The launcher's process: a fork, which has imported what `roots train` imports; its ranks begin anew."""
    sys.exit(launch(len(words) - 1, [str(RANKS), *words]))


def launching_under_nohup(words: Sequence[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    launching(words)


def start(folder: Path, behaviours: list[str], stdout: str = os.devnull, main=launching) -> BaseProcess:
    variables = {name: value for name, value in environ().items() if name not in UNSET}
    return start_fork(main, [str(folder), *behaviours], variables, [stdout, str(folder / "stderr")])


def finish(launcher: BaseProcess, folder: Path) -> tuple[int | None, str]:
    try:
        launcher.join(PATIENCE_S)
    finally:
        launcher.kill()
        launcher.join()
    return launcher.exitcode, (folder / "stderr").read_text()


def pids(folder: Path, size: int) -> list[int]:
    return [int((folder / f"pid{rank}").read_text()) for rank in range(size)]


def until_met(folder: Path, size: int) -> None:
    everybody = [folder / f"met{rank}" for rank in range(size)]
    assert comes_true(lambda: all(file.exists() for file in everybody)), "the ranks never met"


def test_a_run_that_works_is_quiet_and_shares_out_the_cores(tmp_path):
    code, err = finish(start(tmp_path, ["fine", "fine"]), tmp_path)
    assert (code, err) == (0, "")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / f"met{rank}").read_text() for rank in range(2)] == [f"2 {threads} {threads}"] * 2
    assert gone(pids(tmp_path, 2))


def test_the_rank_that_fails_is_shown_first_and_ends_those_that_wait_or_hang(tmp_path):
    code, err = finish(start(tmp_path, ["wait", "raise", "hang", "wait"]), tmp_path)
    lines = err.splitlines()
    assert code == 1
    assert lines[0].startswith("╭─ rank 1 (pp0 dp1 tp0, node ") and lines[0].endswith("failed first")
    assert lines[1] == "│ ValueError: the flux capacitor is empty"
    assert lines[-1] == "ranks 0, 2, 3 stopped because of it."
    assert "ChildFailedError" not in err and "SIGTERM" not in err and "Connection" not in err
    file = tmp_path / "run" / "errors" / "rank_00001.txt"
    assert f"full traceback: {file}" in err
    assert "in behave" in file.read_text() and file.read_text().endswith("the flux capacitor is empty\n")
    assert gone(pids(tmp_path, 4))


def test_a_rank_that_is_killed_is_named_and_the_terminal_gets_its_cursor_back(tmp_path):
    outer, inner = os.openpty()
    code, err = finish(start(tmp_path, ["alone:hang", "alone:killed"], stdout=os.ttyname(inner)), tmp_path)
    os.close(inner)
    assert code == 1 and os.read(outer, 1000) == b"\x1b[?25h"
    os.close(outer)
    assert err.startswith("✗ rank 1 was killed by SIGKILL") and "ran out of memory" in err
    assert "rank 0 stopped because of it." in err and "Traceback" not in err
    assert gone(pids(tmp_path, 2))


def test_a_users_mistake_found_on_all_ranks_is_told_once_without_a_traceback(tmp_path):
    code, err = finish(start(tmp_path, ["alone:user", "alone:user"]), tmp_path)
    assert code == 2
    assert err == "✗ corpus = 'x': expected tokens. Fix: prepare it.\n"


@pytest.mark.parametrize("parent", ["parent", "parent, deaf child, killed"])
def test_what_a_rank_started_goes_with_it(tmp_path, parent):
    """A process that a rank has just forked can lose a signal; a rank that was killed has sent none."""
    launcher = start(tmp_path, ["alone:hang", f"alone:{parent}"])
    code, _ = finish(launcher, tmp_path)
    assert code == 1
    assert gone([*pids(tmp_path, 2), int((tmp_path / "child").read_text())])


@pytest.mark.parametrize(
    "number, behaviours", [(signal.SIGTERM, ["wait", "hang"]), (signal.SIGINT, ["alone:hang", "alone:hang"])]
)
def test_a_signal_to_the_launcher_ends_all(tmp_path, number, behaviours):
    launcher = start(tmp_path, behaviours)
    until_met(tmp_path, 2)
    os.kill(launcher.pid, number)
    code, err = finish(launcher, tmp_path)
    assert (code, err) == (128 + number, "")
    assert gone(pids(tmp_path, 2))


def test_a_launcher_under_nohup_outlives_its_terminal(tmp_path):
    launcher = start(tmp_path, ["alone:hang", "alone:hang"], main=launching_under_nohup)
    until_met(tmp_path, 2)
    os.kill(launcher.pid, signal.SIGHUP)
    assert not gone([launcher.pid], 1.5) and all(map(alive, pids(tmp_path, 2)))
    launcher.terminate()
    assert finish(launcher, tmp_path)[0] == 128 + signal.SIGTERM
    assert gone(pids(tmp_path, 2))


def test_no_orphan_is_left_when_the_launcher_is_killed(tmp_path):
    launcher = start(tmp_path, ["alone:hang", "alone:deaf"])
    until_met(tmp_path, 2)
    assert all(alive(pid) for pid in pids(tmp_path, 2))
    launcher.kill()
    assert gone(pids(tmp_path, 2))
    launcher.join()
