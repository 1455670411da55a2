"""Run tests against planted mutants: torch and pytest are imported once, and each mutant is a fork of that process.

    [Job] --fork--> a copy of the repository with the bug --pytest--> how each of its tests ended --> [Result]

A fork has not imported the package before it runs, and takes it from its copy. Worlds (roots_dist.testing.world) fork
from it too, in place of the forkserver that they would start and that would import everything again.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .mutant import ROOT, Mutant, plant

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Before torch is imported; as tests/conftest.py and roots_dist.testing.world set it."""
PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.fx.experimental.symbolic_shapes",
    "numpy",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers",
    "sklearn.metrics",
    "matplotlib.backends.backend_agg",
    "pydantic",
    "safetensors.torch",
    "tokenizers",
    "hypothesis",
    "pytest",
)
"""What tests and the package import that is not the package."""
LIMIT_S = 150.0
"""Seconds without a test that ends, after which a mutant counts as hanging."""
PLUGINS_OFF = ("cacheprovider", "xdist", "timeout")
OPTIONS = ("-q", "-o", "addopts=", "-m", "not full", *(f"-pno:{plugin}" for plugin in PLUGINS_OFF))
"""Options of pytest."""


@dataclass(frozen=True)
class Job:
    """Tests that are run together in one copy."""

    mutant: Mutant | None
    """None: the source as it is."""
    tests: tuple[str, ...]
    """Node ids, or whole files."""
    until_first_failure: bool = False


@dataclass(frozen=True)
class Ending:
    """How a test ended."""

    outcome: str
    """passed, failed (by a comparison), error (anything else that is raised, anywhere), skipped, missing or hung."""
    said: str = ""
    """The error in one line."""


@dataclass(frozen=True)
class Result:
    job: Job
    endings: dict[str, Ending]
    """By node id; every one that the job names is in it, unless it stops at the first failure."""
    seconds: float

    @property
    def as_it_should(self) -> bool:
        """A mutant dies by a comparison; without one every test passes."""
        mutant = self.job.mutant
        if mutant is None:
            return all(ending.outcome == "passed" for ending in self.endings.values())
        return all(ending.outcome == "failed" and mutant.says in ending.said for ending in self.endings.values())


def preload(names: Sequence[str] = PRELOADED) -> None:
    """Import what every job needs, and nothing of the package. Call it before the first job."""
    os.environ.update(ENVIRONMENT)
    for name in names:
        with suppress(ImportError):  # an extra that is not installed: its tests skip
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "roots_dist" for name in sys.modules), "jobs import the package themselves"
    gc.freeze()


@dataclass
class _Running:
    job: Job
    pid: int
    pipe: int
    folder: tempfile.TemporaryDirectory[str]
    since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    said: bytes = b""

    def read(self) -> bool:
        """Take in what there is; whether the job has said all."""
        part = os.read(self.pipe, 1 << 16)
        self.said += part
        self.heard = time.monotonic()
        return not part

    def end(self, hung: bool) -> Result:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # it leads a group of its own, with every process that it has started
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        self.folder.cleanup()
        seconds = time.monotonic() - self.since
        found = self.said.strip()
        said = json.loads(found) if found and not hung else {}
        how_else = "hung" if hung else "missing" if found else "error"  # without a word it has died
        none = Ending(how_else, said.get("", ("", ""))[1])
        endings = {test: Ending(*how) for test, how in said.items() if test}
        asked = [test for test in self.job.tests if "::" in test and not self.job.until_first_failure]
        endings = {test: endings.get(test, none) for test in asked} if asked else endings or {"": none}
        return Result(self.job, endings, seconds)


Said = dict[str, tuple[str, str]]
"""Node id -> outcome and error."""
Answer = Callable[[Job, Path, Callable[[], None]], Said]
"""Runs a job's tests in this process, which is a fork with a folder of its own; calls the function after each test."""


def run(
    jobs: Iterable[Job], workers: int = 1, limit_s: float = LIMIT_S, answer: Answer | None = None
) -> Iterator[Result]:
    """Run the jobs, several at a time, and give each result as it comes. One that is silent for limit_s hangs."""
    waiting, running = iter(jobs), list[_Running]()
    try:
        while True:
            while len(running) < workers and (job := next(waiting, None)):
                running.append(_start(job, answer or _answer))
            if not running:
                return
            ready, _, _ = select.select([job.pipe for job in running], [], [], 1.0)
            for job in list(running):
                hung = time.monotonic() - job.heard > limit_s
                if hung or (job.pipe in ready and job.read()):
                    running.remove(job)
                    yield job.end(hung)
    finally:
        for job in running:
            job.end(hung=True)


def _start(job: Job, answer: Answer) -> _Running:
    folder = tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True)
    ours, its = os.pipe()
    pid = os.fork()
    if pid:
        os.close(its)
        return _Running(job, pid, ours, folder)
    try:
        os.setsid()
        os.close(ours)
        said = answer(job, Path(folder.name).resolve(), lambda: bool(os.write(its, b"\n")))
    except BaseException:
        said = {"": ("error", traceback.format_exc())}
    with os.fdopen(its, "w") as pipe:
        json.dump(said, pipe)
    os._exit(0)  # nothing of the parent's is cleaned up here


def _answer(job: Job, folder: Path, after_each: Callable[[], None]) -> Said:
    """Run a job's tests in a copy of the repository, from which this process takes the package."""
    plant(job.mutant, folder)
    os.chdir(folder)
    write_output_to(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    importlib.invalidate_caches()
    fork_instead_of_a_forkserver()
    import pytest

    endings = Endings(after_each)
    options = ["-x"] if job.until_first_failure else []
    pytest.main([*options, *OPTIONS, *(f"tests/{test}" for test in job.tests)], plugins=[endings])
    package = sys.modules.get("roots_dist")
    assert package is None or Path(str(package.__file__)).is_relative_to(folder), f"{package} is not the mutant's"
    return endings.found


def write_output_to(folder: Path) -> None:
    """Let standard output and error be a file there."""
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)


class Endings:
    """A plugin of pytest: the worst that happened to each test, and to collecting it."""

    ORDER = ("passed", "skipped", "failed", "error")

    def __init__(self, after_each: Callable[[], None] = lambda: None) -> None:
        self.found: Said = {}
        self.after_each = after_each

    def _note(self, test: str, outcome: str, said: str = "") -> None:
        before = self.found.get(test, ("passed", ""))
        if test not in self.found or self.ORDER.index(outcome) > self.ORDER.index(before[0]):
            self.found[test] = outcome, said

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        import pytest

        test, raised = item.nodeid.removeprefix("tests/"), call.excinfo
        if raised is None:
            if call.when == "call":
                self._note(test, "passed")
            return
        said = " ".join(f"{raised.typename}: {raised.value}".split())[:4000]
        if raised.errisinstance(pytest.skip.Exception):
            self._note(test, "skipped", said)
        elif call.when == "call" and _is_comparison(raised):
            self._note(test, "failed", said)
        else:
            self._note(test, "error", said)

    def pytest_runtest_logfinish(self) -> None:
        self.after_each()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found[""] = "error", f"{report.nodeid}: {report.longreprtext[-300:]}"


def _is_comparison(raised: Any) -> bool:
    """Whether a test has failed by its own words, in its process or in a rank; not by an assertion of the package."""
    import pytest

    if raised.errisinstance(pytest.fail.Exception):
        return True  # nothing was raised where something should have been
    if raised.typename == "WorldFailed":  # its first rank is the likeliest cause
        first = str(raised.value).partition("\n\n")[2].partition("\n\nrank ")[0]
        where = re.findall(r'^  File "([^"]+)"', first, re.MULTILINE)
        return bool(re.search(r"^AssertionError", first, re.MULTILINE)) and _speaks_for_a_test(Path(where[-1]))
    return bool(raised.errisinstance(AssertionError)) and _speaks_for_a_test(Path(raised.traceback[-1].path))


def _speaks_for_a_test(file: Path) -> bool:
    return "roots_dist" not in file.parts or "testing" in file.parts


def fork_instead_of_a_forkserver() -> None:
    """Let multiprocessing's forkserver be a fork of this process, where it would start Python anew."""
    from multiprocessing import forkserver

    def fork(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        _forget_files(keep=passfds)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest has put files of its own there
        logging.root.handlers.clear()
        logging.root.setLevel(logging.WARNING)
        try:
            exec(args[-1], {})
        finally:
            os._exit(0)

    forkserver.util = SimpleNamespace(**{**vars(forkserver.util), "spawnv_passfds": fork})


def _forget_files(keep: Sequence[int]) -> None:
    """Let go of every file that is open, as exec would: a pipe that stays open says that we live.

    The numbers stay taken. Python's files still hold them, pytest's log among these, and write and close what has the
    number by then: a rank's warning went to the socket by which it answers, and the forkserver lost one of its own.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in {int(name) for name in os.listdir("/dev/fd")} - {0, 1, 2, nothing, *keep}:
        with suppress(OSError):  # of the listing itself
            os.fstat(fd)
            os.dup2(nothing, fd, inheritable=False)
