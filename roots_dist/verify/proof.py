"""The outcome of one comparison of a layout with one process."""

from __future__ import annotations

from dataclasses import dataclass

from roots_dist.testing.parity import Difference


@dataclass(frozen=True)
class Proof:
    """One layout against one process."""

    title: str
    notes: tuple[str, ...]
    rows: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)
