"""Steps whose loss or gradient norm is a spike are not taken: their gradient would throw the weights far off.

    losses and norms of the last WINDOW steps that were taken --limits--> train_step does not take a step above one
        --train.on_spike=skip--> the next batch is next; the third in a row stops the run
        --train.on_spike=rewind--> rewind.py; the third after one and the same checkpoint stops the run

A limit is median + threshold × spread, where spread is 1.4826 × the median absolute deviation (a standard deviation,
for a normal distribution), and at least 1 % of the median. Thresholds are train.spike_threshold (of the loss) and
train.norm_spike_threshold. Medians do not follow a few odd values, and what is not finite, or was not taken, is not in
the window. All this is saved with a checkpoint, so that a resumed run skips the same steps and stops at the same one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

from roots_dist.errors import UserError

WINDOW, LEAST = 64, 16
"""Number of losses, and of norms, that are remembered, and of those without which nothing is judged."""
NORMAL, SMALLEST = 1.4826, 0.01
MOST = 3
"""Number of spikes in a row, or after one checkpoint, with which the run stops: that is no odd sample any more."""
LeftOut = tuple[int, int]
"""A step (counted from 0), and how many samples the steps from it on do not read that they would else read first."""


class SpikesError(UserError):
    """Several steps in a row were spikes."""


class RecentSteps:
    """Numbers of the last steps that were taken, by which the next is judged."""

    def __init__(self, threshold: float | None, numbers: Iterable[float] = ()):
        self.threshold = threshold
        self.numbers = deque(numbers, maxlen=WINDOW)

    @property
    def limit(self) -> float:
        """The largest number of a step that is taken."""
        if self.threshold is None or len(self.numbers) < LEAST:
            return math.inf
        median = statistics.median(self.numbers)
        spread = NORMAL * statistics.median(abs(number - median) for number in self.numbers)
        return median + self.threshold * max(spread, SMALLEST * abs(median))

    def note(self, number: float) -> None:
        if math.isfinite(number):
            self.numbers.append(number)


class Spikes:
    """Limits that a step is judged by, and the record of spikes. Equal on all ranks."""

    def __init__(
        self,
        threshold: float | None = None,
        losses: Iterable[float] = (),
        spikes_in_a_row: int = 0,
        *,
        norm_threshold: float | None = None,
        norms: Iterable[float] = (),
        left_out: Sequence[LeftOut] = (),
    ):
        self.loss, self.norm = RecentSteps(threshold, losses), RecentSteps(norm_threshold, norms)
        self.in_a_row = spikes_in_a_row
        self.left_out = tuple(left_out)

    def note(self, step: int, loss: float, was_spike: bool, was_skipped: bool = False, norm: float = math.nan) -> None:
        """Remember a step (counted from 1). A step that was skipped for another reason says nothing of spikes, though
        its loss may be finite. Raises SpikesError if it is the third spike in a row."""
        if was_skipped and not was_spike:
            return
        self.in_a_row = self.in_a_row + 1 if was_spike else 0
        if not was_spike:
            self.loss.note(loss)
            self.norm.note(norm)
        if self.in_a_row == MOST:
            what = f"loss {loss:.4g}" if loss > self.loss.limit else f"gradient norm {norm:.4g}"
            raise SpikesError(f"step {step}: {what} is the third spike in a row. Fix: {FIX}.")

    def samples_left_out(self, step: int) -> int:
        """Number of samples that are not read before this step (counted from 0) because of spikes."""
        return sum(samples for first, samples in self.left_out if first <= step)

    def saved(self) -> dict[str, object]:
        """All that a checkpoint keeps: what is not empty, under the names of the constructor."""
        found = {
            "losses": list(self.loss.numbers) if self.loss.threshold is not None else [],
            "norms": list(self.norm.numbers) if self.norm.threshold is not None else [],
            "spikes_in_a_row": self.in_a_row,
            "left_out": [list(one) for one in self.left_out],
        }
        return {name: value for name, value in found.items() if value}


FIX = (
    "resume from an earlier checkpoint with a lower optim.lr, or raise train.spike_threshold or "
    "train.norm_spike_threshold"
)
