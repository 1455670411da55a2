"""Name ranks that compute more slowly than others of their stage: by the time that they compute and wait for their
own batches, not by the time that they wait for others, which is longest on the ranks that are not slow.

A rank whose batches take long to make is slow only if its thread does not keep up (learning/data/ahead.py). On a GPU
only the wait for batches is timed (callbacks.py), so that only this is compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from roots_dist.layout import Layout

FACTOR = 2.0
"""A rank is slow that takes this many times the median of its stage …"""
SHARE = 0.1
"""… and longer than the median by this share of a step …"""
REPORTS = 3
"""… in this many reports in a row."""
OWN_PARTS = ("data", "compute")


class SlowRanks:
    """Counts of how often in a row each rank has been slow."""

    def __init__(self, layout: Layout) -> None:
        self._stages = [layout.place(rank).pp for rank in range(layout.world_size)]
        self._counts = [0] * layout.world_size

    def note(self, parts: Mapping[str, Sequence[float]], step_s: float) -> dict[int, tuple[float, float]]:
        """Note the seconds of each part on every rank, means over the steps of a report. Returns the ranks that have
        now been slow REPORTS times in a row, with their seconds and the median."""
        own = [sum(seconds) for seconds in zip(*(parts[name] for name in OWN_PARTS if name in parts))]
        found: dict[int, tuple[float, float]] = {}
        for rank, seconds in enumerate(own):
            median = statistics.median_low([s for s, stage in zip(own, self._stages) if stage == self._stages[rank]])
            is_slow = seconds > FACTOR * median and seconds - median > SHARE * step_s
            self._counts[rank] = self._counts[rank] + 1 if is_slow else 0
            if self._counts[rank] == REPORTS:
                found[rank] = (seconds, median)
        return found
