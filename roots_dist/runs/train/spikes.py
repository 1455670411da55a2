"""Steps whose loss is a spike are skipped: their gradient would throw the weights far off.

    losses of the last WINDOW steps that were taken --limit--> train_step skips a step above it --note--> three: stop

The limit is median + train.spike_threshold × spread, where spread is 1.4826 × the median absolute deviation (a standard
deviation, for a normal distribution), and at least 1 % of the median. Medians do not follow a few odd values, and what
is not finite, or was skipped, is not in the window. It is saved with a checkpoint, and so is the number of spikes in a
row, so that a resumed run skips the same steps and stops at the same one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from roots_dist.errors import UserError

WINDOW, LEAST = 64, 16
"""Number of losses that are remembered, and of those without which nothing is judged."""
NORMAL, SMALLEST = 1.4826, 0.01
IN_A_ROW = 3
"""Number of spikes in a row after which the run stops: that is no odd sample any more."""


class SpikesError(UserError):
    """Several steps in a row were spikes."""


class Spikes:
    """The losses that a step is judged by. Equal on all ranks."""

    def __init__(self, threshold: float | None, losses: Iterable[float] = (), in_a_row: int = 0):
        self.threshold = threshold
        self.in_a_row = in_a_row
        self._losses = deque(losses, maxlen=WINDOW)

    @property
    def limit(self) -> float:
        """The largest loss of a step that is taken."""
        if self.threshold is None or len(self._losses) < LEAST:
            return math.inf
        median = statistics.median(self._losses)
        spread = NORMAL * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.threshold * max(spread, SMALLEST * abs(median))

    def note(self, step: int, loss: float, was_spike: bool, was_skipped: bool = False) -> None:
        """Remember the loss of a step (counted from 1). A step that was skipped for another reason says nothing of
        spikes, though its loss may be finite. Raises SpikesError if it is the third spike in a row."""
        if was_skipped and not was_spike:
            return
        self.in_a_row = self.in_a_row + 1 if was_spike else 0
        if not was_spike and math.isfinite(loss):
            self._losses.append(loss)
        if self.in_a_row == IN_A_ROW:
            fix = "resume from an earlier checkpoint with a lower optim.lr, or raise train.spike_threshold"
            raise SpikesError(f"step {step}: loss {loss:.4g} is the third spike in a row. Fix: {fix}.")

    def saved(self) -> list[float]:
        """The losses, for a checkpoint."""
        return list(self._losses)
