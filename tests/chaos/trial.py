"""A trial, and what came of it, as data: run.py counts them, docs/make_trust.py shows them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What came of one trial."""

    kind: str
    """What was done, in words: a row of the table."""
    held: bool
    """Whether the family's promise was kept."""
    words: str = ""
    """What was seen, for a reader who asks why it did not hold."""
    count: int = 1
    """Number of states that were looked at, if one trial makes many."""


@dataclass(frozen=True)
class Family:
    """Trials of one sort."""

    name: str
    harm: str
    """What is done to a run, in words."""
    promise: str
    """What must hold each time."""
    trial: Callable[[random.Random, Path], Outcome]
    """Called with random numbers of its own, which depend on the seed and the trial's number alone, and an empty
    folder."""
    sample: int = 3
    """Number of trials in every `make test`; 0: one in `make test-full`, because it starts processes of its own."""
