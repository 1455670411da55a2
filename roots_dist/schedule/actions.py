"""The words of a pipeline schedule. A program is data: for each pipeline rank, the list of what it does in order.

    schedules.py --compute only--> communication.py --with sends and receives--> check.py plays it, executor.py runs it

Stage ≠ rank: with v chunks, rank r of p holds the stages r, p + r, 2p + r, …
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and weights
    INPUT = "I"  # gradients of inputs only; the weights' are put off (zero bubble)
    WEIGHT = "W"  # the weights' gradients that INPUT put off
    SEND_FORWARD = "sf"  # hand the stage's output to stage + 1; returns at once
    RECV_FORWARD = "rf"  # begin to receive the stage's input from stage - 1; returns at once, FORWARD waits for it
    SEND_BACKWARD = "sb"  # hand the gradient of the stage's input to stage - 1; returns at once
    RECV_BACKWARD = "rb"  # begin to receive the gradient of the stage's output; BACKWARD or INPUT waits for it

    __hash__ = object.__hash__  # members are singletons; Enum hashes the name, in Python, millions of times

    def __repr__(self) -> str:
        return self.value


class Action(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.microbatch}"


Program = list[list[Action]]
"""Program[rank] is what that pipeline rank does, in order."""


class InvalidProgram(Exception):
    """A program that cannot be run to its end. The message has one line per reason."""


def rank_of(stage: int, num_ranks: int) -> int:
    """The pipeline rank that holds a stage."""
    return stage % num_ranks
