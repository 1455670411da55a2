"""`python -m tests.mutants.run`: plant every mutant of the table, one after another, and show which ones live.

A mutant is dead if its test fails by a comparison, and the same test passes without it. Exit code 1 if one lives.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from .mutant import Mutant
from .runner import Job, Result, preload, run
from .table import AREAS, MUTANTS


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    chosen = [MUTANTS[name] for name in asked.only] if asked.only else list(MUTANTS.values())
    if asked.list:
        for area, mutants in AREAS.items():
            print(area)
            for mutant in mutants:
                if mutant in chosen:
                    print(f"  {mutant.name}: {mutant.bug}\n    {mutant.file} dies in {mutant.test}")
        return 0
    since = time.monotonic()
    preload()
    living = survivors(chosen, asked.workers, unmutated=not asked.mutants_only)
    seconds = time.monotonic() - since
    print(f"\n{len(chosen) - len(living)} of {len(chosen)} mutants are dead, in {seconds:.0f} s")
    for line in living:
        print(f"✗ {line}")
    return 1 if living else 0


def survivors(mutants: Sequence[Mutant], workers: int, *, unmutated: bool) -> list[str]:
    """Return the mutants that live, one line each, with why; each result is printed as it comes.

    unmutated: also require that the tests pass without a bug, which a suite that runs them anyway need not.
    """
    broken, living = dict[str, str](), list[str]()
    if unmutated:
        by_file: dict[str, list[str]] = {}
        for test in dict.fromkeys(mutant.test for mutant in mutants):
            by_file.setdefault(test.partition("::")[0], []).append(test)
        jobs = [Job(None, tuple(tests)) for tests in by_file.values()]
        for number, result in enumerate(run(jobs, workers), 1):
            say(number, len(jobs), result)
            broken |= {
                test: f"{ending.outcome}: {ending.said[:1000]}"
                for test, ending in result.endings.items()
                if ending.outcome != "passed"
            }
    jobs = [Job(mutant, (mutant.test,)) for mutant in mutants]
    for number, result in enumerate(_hanging_ones_again(jobs, workers), 1):
        say(number, len(jobs), result)
        mutant, (ending,) = result.job.mutant, result.endings.values()
        assert mutant is not None
        if mutant.test in broken:
            living.append(f"{mutant.name}: {mutant.test} without it: {broken[mutant.test]}")
        elif not result.as_it_should:
            living.append(f"{mutant.name}: {mutant.test}: {ending.outcome} {ending.said[:1000]}")
    return living


def _hanging_ones_again(jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """The results, each job's once. One that hangs is tried a second time: a fork can inherit a lock that is held."""
    hung: list[Job] = []
    for result in run(jobs, workers):
        if any(ending.outcome == "hung" for ending in result.endings.values()):
            hung.append(result.job)
        else:
            yield result
    yield from run(hung, workers)


def say(number: int, count: int, result: Result) -> None:
    mutant = result.job.mutant
    if mutant is None:
        file = result.job.tests[0].partition("::")[0]
        what = f"{file} without a mutant"
        how = ", ".join(sorted({ending.outcome for ending in result.endings.values()}))
    else:
        (ending,) = result.endings.values()
        what, how = mutant.name, f"{ending.outcome}: {ending.said[:90]}" if ending.said else ending.outcome
    print(
        f"{'✓' if result.as_it_should else '✗'} {number:3}/{count} {result.seconds:5.1f} s  {what}  {how}", flush=True
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MUTANTS, help="these mutants")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--mutants-only", action="store_true", help="do not run the tests without a mutant")
    return parser


if __name__ == "__main__":
    sys.exit(main())
