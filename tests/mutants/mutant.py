"""A mutant: one bug, planted in the source, so that every process that a test starts has it.

    Mutant(file, before, after) --plant--> a copy of the repository --runner.py--> its test fails by a comparison

Patching the running process of a layout alone would compare it with a single process that is right, and so say nothing
of the bugs that both share. Here both sides of every comparison run the mutant.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("roots_dist", "tests", "configs", "pyproject.toml")
"""What tests read of the repository; a copy has no more."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One text of one file gives way to another."""

    file: str
    """A file of the package, as `world/rng.py`."""
    before: str
    """Text of the file, which occurs exactly once, or `times` times; all of them are replaced."""
    after: str
    times: int = 1

    def applied(self, source: str) -> str:
        """The file's text afterwards. Raises ValueError if the text before is not there as often as it should be."""
        found = source.count(self.before)
        if found != self.times or self.before == self.after:
            raise ValueError(f"{self.file} has {self.before!r} {found} times: expected {self.times}, and a change")
        return source.replace(self.before, self.after)


@dataclass(frozen=True, kw_only=True)
class Mutant(Edit):
    """A bug that a person could have written by mistake: an edit, and rarely some that belong to it."""

    name: str
    bug: str
    """What goes wrong, in words."""
    test: str
    """Node id below tests/ of the test that must fail."""
    also: tuple[Edit, ...] = ()
    says: str = ""
    """Words that the failure must have, where it should name the tensor that is wrong first."""

    @property
    def edits(self) -> tuple[Edit, ...]:
        return (self, *self.also)


def plant(mutant: Mutant | None, folder: Path) -> None:
    """Copy what tests read into an empty folder, with the bug if there is one. The working tree stays as it is.

    Times of files are kept, so that Python takes their compiled form from the copy too.
    """
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy2(ROOT / name, folder / name)
    for edit in mutant.edits if mutant else ():
        file = folder / "roots_dist" / edit.file
        file.write_text(edit.applied(file.read_text(encoding="utf-8")), encoding="utf-8")
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink()
