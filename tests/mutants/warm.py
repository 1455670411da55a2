"""Run tests against mutants of functions in a process that has imported and collected everything once.

    process without the package --fork--> one in which pytest has collected all tests of all jobs
        --a fork for each job--> functions with the mutated code --its tests, until one fails--> [Result]

A job costs its tests and nothing else. Worlds of ranks fork from it too. What a fork does not plant is code that runs
when a module is imported, and processes that a test starts anew. So of mutants that live here nothing is known before
runner.py has imported them from a copy.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from .mutant import ROOT, Mutant
from .runner import OPTIONS, Ending, Endings, Job, Result, Said, fork_instead_of_a_forkserver, run, write_output_to

PACKAGE = ROOT / "roots_dist"
CO_OPTIMIZED = 1
"""The flag of a function's code; a module's and a class' have it not."""


Place = tuple[str, int, bytes, bytes]
"""A function's name, line, instructions, and where each comes from: code that has run need not equal itself."""


def place_of(code: CodeType) -> Place:
    return code.co_name, code.co_firstlineno, code.co_code, code.co_linetable


def changed_code(mutant: Mutant) -> dict[Place, CodeType] | None:
    """Mutated code of functions; None if what runs at import is another too."""
    name = str(PACKAGE / mutant.file)
    before = (PACKAGE / mutant.file).read_text(encoding="utf-8")
    old, new = (compile(source, name, "exec", dont_inherit=True) for source in (before, mutant.applied(before)))
    return _changed(old, new)


def _changed(old: CodeType, new: CodeType) -> dict[Place, CodeType] | None:
    old_parts, new_parts = _parts(old), _parts(new)
    if len(old_parts) != len(new_parts):
        return None
    if old.co_flags & CO_OPTIMIZED:
        found = {place_of(old): new}
    else:
        if (old.co_code, old.co_names, _constants(old)) != (new.co_code, new.co_names, _constants(new)):
            return None
        found = {}
    for part, mutated in zip(old_parts, new_parts):
        inner = _changed(part, mutated)
        if inner is not None:
            found |= inner
        elif not old.co_flags & CO_OPTIMIZED and not part.co_flags & CO_OPTIMIZED:
            return None
        else:
            found[place_of(part)] = mutated
    return found


def _parts(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _constants(code: CodeType) -> list[tuple[type, Any]]:
    return [(type(constant), constant) for constant in code.co_consts if not isinstance(constant, CodeType)]


def run_warm(jobs: Sequence[Job], workers: int, limit_s: float) -> Iterator[Result]:
    """The jobs' results, as they come. To be called where the package is not imported, after preload()."""
    ours, its = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ours)
            _collect_and_run(jobs, workers, limit_s, its)
        except BaseException:
            os.write(its, f"{json.dumps(traceback.format_exc())}\n".encode())
        finally:
            os._exit(0)
    os.close(its)
    with os.fdopen(ours) as pipe:
        for line in pipe:
            said = json.loads(line)
            assert not isinstance(said, str), said
            number, seconds, endings = said
            yield Result(jobs[number], {test: Ending(*how) for test, how in endings.items()}, seconds)
    os.waitpid(pid, 0)


def _collect_and_run(jobs: Sequence[Job], workers: int, limit_s: float, pipe: int) -> None:
    import pytest

    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        write_output_to(Path(folder))  # pytest's, which speaks of no mutant
    os.environ["PYTHONPATH"] = str(ROOT)
    fork_instead_of_a_forkserver()
    files = dict.fromkeys(f"tests/{test.partition('::')[0]}" for job in jobs for test in job.tests)
    plugin = _Jobs(jobs, workers, limit_s, pipe)
    code = pytest.main([*OPTIONS, *files], plugins=[plugin])
    assert code == 0, f"pytest ended with {code} {plugin.error}"


class _Jobs:
    """A plugin of pytest: in place of the tests that were collected, the jobs."""

    def __init__(self, jobs: Sequence[Job], workers: int, limit_s: float, pipe: int):
        self.jobs, self.workers, self.limit_s, self.pipe = jobs, workers, limit_s, pipe
        self.error = ""

    def pytest_internalerror(self, excinfo: Any) -> None:
        self.error = str(excinfo.value)

    def pytest_runtestloop(self, session: Any) -> bool:
        assert not session.testsfailed, "not every test could be collected"
        self.session = session
        for test in {test for job in self.jobs for test in job.tests}:
            assert self._items(test), f"{test} is no test of this suite"
        _import_what_is_mutated_or_comes_late(self.jobs)
        gc.unfreeze()  # what is frozen is not listed
        known = gc.get_objects()
        self.functions = defaultdict[str, list[FunctionType]](list)
        for function in known:
            if isinstance(function, FunctionType):
                self.functions[function.__code__.co_filename].append(function)
        self.caches = [
            cache
            for cache in known
            if isinstance(cache, functools._lru_cache_wrapper) and str(cache.__module__).startswith("roots_dist")
        ]
        del known
        gc.freeze()
        numbers = {id(job): number for number, job in enumerate(self.jobs)}
        for result in run(self.jobs, self.workers, self.limit_s, self.answer):
            endings = {test: (ending.outcome, ending.said) for test, ending in result.endings.items()}
            line = json.dumps([numbers[id(result.job)], result.seconds, endings])
            os.write(self.pipe, f"{line}\n".encode())
        return True

    def answer(self, job: Job, folder: Path, after_each: Callable[[], None]) -> Said:
        write_output_to(folder)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)
        if job.mutant is not None:
            self._plant(job.mutant)
        endings = Endings(after_each)
        self.session.config.pluginmanager.register(endings)
        items = [*dict.fromkeys(item for test in job.tests for item in self._items(test))]
        for item, following in zip(items, [*items[1:], None]):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if job.until_first_failure and any(how in ("failed", "error") for how, _ in endings.found.values()):
                break
        return endings.found

    def _items(self, test: str) -> list[Any]:
        asked = f"tests/{test}"
        beginnings = f"{asked}::", f"{asked}["
        return [i for i in self.session.items if i.nodeid == asked or i.nodeid.startswith(beginnings)]

    def _plant(self, mutant: Mutant) -> None:
        mutated = changed_code(mutant)
        assert mutated is not None, f"{mutant.name} is of what runs at import"
        for function in self.functions[str(PACKAGE / mutant.file)]:
            code = mutated.get(place_of(function.__code__))
            with suppress(ValueError):  # a closure that holds other names now: made when its module was imported
                function.__code__ = code or function.__code__
        for cache in self.caches:
            cache.cache_clear()


def _import_what_is_mutated_or_comes_late(jobs: Sequence[Job]) -> None:
    """What is imported by a fork is imported by each, and a file that is imported later has no mutant."""
    from roots_dist.testing import world

    mutated = [f"roots_dist.{job.mutant.file[:-3].replace('/', '.')}" for job in jobs if job.mutant]
    for name in (*mutated, *world.PRELOAD):
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
