"""docs/trust.md, made from the results of a long run of tests/chaos.

    python -m tests.chaos.run --minutes 60 --results docs/trust.json --> docs/trust.json
    python docs/make_trust.py                                        --> docs/trust.md

tests/test_readme.py fails while the page does not say what the results say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chaos.table import FAMILIES  # noqa: E402 # a folder of tests, which no installation has

PAGE, RESULTS = ROOT / "docs" / "trust.md", ROOT / "docs" / "trust.json"
HEAD = """\
# Trust

What was done to runs, and what came of it. Programs in [`tests/chaos`](../tests/chaos/__init__.py) do the harm at
random, for as long as they are told to; a few trials of most are in every `make test`, of the others in
`make test-full`. A state is what a trial looks at: a kill, a disk after a loss of power.
[Checkpoints](checkpoints.md) and [error messages](errors.md) say what a run does then,
[security](security.md) who can do what.

    python -m tests.chaos.run --minutes 60 --results docs/trust.json
    python docs/make_trust.py
    python -m tests.chaos.run --only FAMILY N      # one trial again; --again FAMILY: those that did not hold

*Made by `docs/make_trust.py` from [`docs/trust.json`](trust.json).*
"""
PROMISES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("never a silent start from zero", ("damages",), ("runs/test_earlier_life.py",)),
    ("what is damaged is named, and the one before is taken", ("damages", "kills", "power"), ()),
    ("training goes on while a checkpoint is written", ("background", "power", "hung_saves"), ()),
    ("training goes on when a save or a line fails", ("disks", "syscalls"), ()),
    ("every hang is named, in time", ("hangs", "hung_saves"), ()),
    ("a rank that differs is named before the first step", ("differs",), ()),
    ("copies that differ are named or healed, and never saved", ("flips", "deepspeed"), ()),
    ("spikes and repeats end", (), ("unit/test_rewind.py", "runs/test_repeats.py")),
    ("a stop costs no step, and leaves nobody behind", ("signals", "ranks", "launchers"), ()),
    ("nobody leads a run elsewhere, or lets it wait", (), ("bugs/test_odd_folders.py", "unit/test_template_limits.py")),
)
"""What must hold -> the families, and the tests besides, that show it."""


def page() -> str:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["families"]
    parts = [HEAD.rstrip(), "", *_promises(found), "", *_table(found)]
    for name, family in FAMILIES.items():
        if name in found:
            parts += ["", *_section(name, family.harm, family.promise, found[name])]
    return "\n".join(parts) + "\n"


def _promises(found: dict[str, Any]) -> list[str]:
    rows = ["| what must hold | shown by |", "|---|---|"]
    for what, families, tests in PROMISES:
        shown = [f"[{name}](#{name})" for name in families if name in found]
        shown += [f"[`tests/{path}`](../tests/{path})" for path in tests]
        rows.append(f"| {what} | {', '.join(shown)} |")
    return rows


def _table(found: dict[str, Any]) -> list[str]:
    """All families in a few lines."""
    rows = ["| | trials | states | held | did not hold |", "|---|---|---|---|---|"]
    for name in (name for name in FAMILIES if name in found):
        kinds = found[name]["kinds"].values()
        trials, states, held = (sum(kind[what] for kind in kinds) for what in ("trials", "states", "held"))
        rows.append(f"| [{name}](#{name}) | {trials:,} | {states:,} | {held:,} | {trials - held:,} |")
    return rows


def _section(name: str, harm: str, promise: str, found: dict[str, Any]) -> list[str]:
    kinds = found["kinds"]
    trials, held = found["trials"], sum(kind["held"] for kind in kinds.values())
    states = sum(kind["states"] for kind in kinds.values())
    rows = [
        f"| {kind} | {n['trials']:,} |" + (f" {n['states']:,} |" if states > trials else "") + f" {n['held']:,} |"
        for kind, n in sorted(kinds.items())
    ]
    head = ["| | trials |" + (" states |" if states > trials else "") + " held |"]
    head += ["|---|---|" + ("---|" if states > trials else "") + "---|"]
    failures = [
        f"* Trial {f['trial']} ({f['kind']}) did not hold: {' '.join(f['words'].split())}" for f in found["failures"]
    ]
    failures += [
        f"* Trial {f['trial']} ({f['kind']}) did not hold at first, and was repeated when the bug that it had found in "
        f"the code, or the fault of the trial, was mended: {' '.join(f['words'].split())[:240]} …"
        for f in found.get("mended", ())
    ]
    intro = f"{harm[0].upper()}{harm[1:]}. It must hold that {promise}. **{held:,} of {trials:,} trials held**"
    intro += f" ({states:,} states)" if states > trials else ""
    return [f"## {name}", "", f"{intro}, in {found['seconds']:,.0f} s ({found['by']}).", "", *head, *rows, *failures]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
