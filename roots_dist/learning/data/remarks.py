"""Remarks on a file of rows: which were skipped and why, what was not read.

rows.py, tasks.py, turns.py --reject, saw--> Remarks --lines--> Examples.remarks, said once when a run begins
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from roots_dist.errors import DataError, Problem


@dataclass
class Remarks:
    """Remarks on a file that has been read: invalid rows that were skipped, and what was not used."""

    skip: bool | None = None
    """finetune.on_error=skip: count invalid rows; otherwise the first one raises its error. None: there is no such
    choice."""
    _skipped: Counter[str] = field(default_factory=Counter)
    """Expected value -> number of rows that have another one."""
    _first_error: DataError | None = None
    _seen: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Remark -> number of rows, place of the first."""

    def reject(self, error: DataError) -> None:
        """Raise the error of a row, or count it."""
        problem = error.args[0]
        if self.skip is False and isinstance(problem, Problem):
            fix = f"{problem.fix}, or leave invalid rows out with finetune.on_error=skip"
            raise DataError(replace(problem, fix=fix)) from error
        if not self.skip:
            raise error
        self._skipped[problem.expected if isinstance(problem, Problem) else str(problem)] += 1
        self._first_error = self._first_error or error

    @contextmanager
    def of_row(self) -> Iterator[None]:
        """Treat a DataError raised inside as that of a row, which is rejected."""
        try:
            yield
        except DataError as error:
            self.reject(error)

    def saw(self, what: str, place: str) -> None:
        """Count a row in which something was noticed; it is said once."""
        count, first = self._seen.get(what, (0, place))
        self._seen[what] = count + 1, first

    @property
    def skipped(self) -> int:
        return sum(self._skipped.values())

    def lines(self) -> tuple[str, ...]:
        """One line for each remark."""
        seen = (f"{what}: {counted(count, 'row')}, the first is {place}" for what, (count, place) in self._seen.items())
        kinds = "; ".join(f"{count:,} × expected {expected}" for expected, count in self._skipped.most_common(3))
        rejected = counted(self.skipped, "row")
        skipped = f"skips {rejected} (finetune.on_error=skip): {kinds}; the first is {self._first_error}"
        return (*seen, *([skipped] if self.skipped else []))


def counted(number: int, what: str) -> str:
    """`1 row`, `2 rows`"""
    return f"{number:,} {what}{'s' * (number != 1)}"
