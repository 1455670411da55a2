"""`python -m tests.chaos.run`: trials until the time is over, counted in a file from which the next call goes on.

    trial n of a family --random numbers from (seed, family, n)--> Outcome --results.json--> docs/make_trust.py

Exit code 1 if a promise was not kept. `--only FAMILY N` repeats one trial and keeps its folder; `--again` repeats, once
the code has been mended, those that did not hold, and counts them anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roots_dist import __version__
from roots_dist.files import write_atomically

from .table import FAMILIES
from .trial import Family, Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    if asked.only:
        place = Path(tempfile.mkdtemp(prefix="chaos-"))
        outcome = attempt(FAMILIES[asked.only[0]], asked.seed, int(asked.only[1]), place)
        print(f"{outcome}\n{place}")
        return int(not outcome.held)
    found = read_results(asked.results, asked.seed)
    chosen = [FAMILIES[name] for name in asked.families or FAMILIES]
    for family in chosen:
        if asked.again:
            _repeat(family, found, asked.seed, asked.results)
        else:
            _run(family, found, asked.seed, 60 * asked.minutes / len(chosen), asked.results)
    failures = [words for family in chosen for words in found["families"][family.name]["failures"]]
    return int(bool(failures))


def attempt(family: Family, seed: int, number: int, place: Path) -> Outcome:
    """One trial. An exception of the trial itself is an outcome that did not hold."""
    draw = random.Random(f"{seed}/{family.name}/{number}")
    try:
        return family.trial(draw, place)
    except Exception as error:
        return Outcome(f"{type(error).__name__} in the trial", held=False, words=str(error)[-400:])


def read_results(path: Path | None, seed: int) -> dict[str, Any]:
    """The results so far; none if there is no such file. Trials of another seed cannot be added to them."""
    if path is None or not path.exists():
        return {"seed": seed, "families": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert found["seed"] == seed, f"{path} has trials of seed {found['seed']}: give --seed {found['seed']}"
    return found


def count(found: dict[str, Any], family: Family, number: int, outcome: Outcome, seconds: float) -> None:
    """Add a trial to the results."""
    mine = found["families"].setdefault(
        family.name, {"trials": 0, "seconds": 0.0, "kinds": {}, "failures": [], "by": ""}
    )
    mine |= {"trials": number + 1, "seconds": round(mine["seconds"] + seconds, 3)}
    mine["by"] = f"roots_dist {__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    kind = mine["kinds"].setdefault(outcome.kind, {"trials": 0, "states": 0, "held": 0})
    kind["trials"] += 1
    kind["states"] += outcome.count
    kind["held"] += outcome.held
    if not outcome.held:
        mine["failures"].append(
            {"trial": number, "kind": outcome.kind, "states": outcome.count, "words": outcome.words}
        )


def uncount(found: dict[str, Any], family: Family, failure: dict[str, Any]) -> None:
    """Take a trial that did not hold out of the results."""
    mine = found["families"][family.name]
    kind = mine["kinds"][failure["kind"]]
    kind["trials"] -= 1
    kind["states"] -= failure.get("states", 1)
    mine["failures"].remove(failure)
    if not kind["trials"]:
        del mine["kinds"][failure["kind"]]


def _repeat(family: Family, found: dict[str, Any], seed: int, results: Path | None) -> None:
    mine = found["families"][family.name]
    number = mine["trials"]
    for failure in list(mine["failures"]):
        outcome, seconds = _timed(family, seed, failure["trial"])
        uncount(found, family, failure)
        count(found, family, failure["trial"], outcome, seconds)
        mine["trials"] = number
        if outcome.held:
            mine.setdefault("mended", []).append(failure)
        print(f"{family.name} {failure['trial']}: {'held' if outcome.held else '✗ ' + outcome.words}")
        _write(found, results)


def _timed(family: Family, seed: int, number: int) -> tuple[Outcome, float]:
    since = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        outcome = attempt(family, seed, number, Path(place))
    return outcome, time.monotonic() - since


def _write(found: dict[str, Any], results: Path | None) -> None:
    if results is not None:
        write_atomically(results, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _run(family: Family, found: dict[str, Any], seed: int, limit_s: float, results: Path | None) -> None:
    began, number = time.monotonic(), found["families"].get(family.name, {}).get("trials", 0)
    while time.monotonic() - began < limit_s:
        outcome, seconds = _timed(family, seed, number)
        count(found, family, number, outcome, seconds)
        if not outcome.held:
            print(f"✗ {family.name} {number}: {outcome.kind}: {outcome.words}")
        number += 1
        _write(found, results)
    held = sum(kind["held"] for kind in found["families"][family.name]["kinds"].values())
    print(f"{family.name}: {held} of {number} trials held")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.chaos.run", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"default: all of {', '.join(FAMILIES)}")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all families together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="file of the counts, which is read first")
    parser.add_argument("--again", action="store_true", help="those that did not hold, after the code was mended")
    parser.add_argument("--only", nargs=2, metavar=("FAMILY", "N"), help="one trial, whose folder is kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
