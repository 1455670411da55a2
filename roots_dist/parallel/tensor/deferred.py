"""Weight gradients that a backward pass puts off, for zero-bubble schedules.

backward of a layer --defer--> closures --drain, after the pass--> WEIGHT action --run--> .grad
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class DeferredWeightGrads:
    """Weight gradients that a backward pass defers. If disabled, they are computed at once."""

    def __init__(self) -> None:
        self.enabled = False
        self._work: list[Callable[[], None]] = []

    def defer(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def __len__(self) -> int:
        return len(self._work)

    def drain(self) -> list[Callable[[], None]]:
        """Return the work deferred since the last call."""
        work, self._work = self._work, []
        return work

    @staticmethod
    def run(work: Iterable[Callable[[], None]]) -> None:
        """Do deferred work. As in a backward pass, autograd records nothing of it, and so keeps none of its tensors."""
        with torch.no_grad():
            for do in work:
                do()
