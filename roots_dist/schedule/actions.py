"""The vocabulary of a pipeline schedule. A program is data: for each pipeline rank, the list of its actions in order.

    schedules.py --compute only--> violations.py refuses or passes it
                               --> communication.py --with sends and receives--> check.py plays it, executor.py runs it

Stage ≠ rank: with v virtual stages per rank, rank r of p holds the stages r, p + r, 2p + r, …
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """Kind of an action."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and weights
    INPUT = "I"  # gradients of inputs only; those of the weights are deferred (zero bubble)
    WEIGHT = "W"  # the weights' gradients that INPUT deferred
    SEND_FORWARD = "sf"  # start to send the stage's output to stage + 1
    RECV_FORWARD = "rf"  # start to receive the stage's input from stage - 1; FORWARD waits for it
    SEND_BACKWARD = "sb"  # start to send the gradient of the stage's input to stage - 1
    RECV_BACKWARD = "rb"  # start to receive the gradient of the stage's output; BACKWARD or INPUT waits for it

    __hash__ = object.__hash__  # members are singletons; Enum hashes the name, in Python, millions of times

    def __repr__(self) -> str:
        return self.value


class Action(NamedTuple):
    """One step of a rank: what it does, with which stage and which microbatch."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.microbatch}"


Program = list[list[Action]]
"""Program[rank] is the list of that pipeline rank's actions, in order."""


class InvalidProgram(Exception):
    """A program that cannot run to its end. The message has one line per reason."""


def rank_of(stage: int, num_ranks: int) -> int:
    """Pipeline rank that holds a stage."""
    return stage % num_ranks


def results(action: Action) -> list[Action]:
    """Results of a compute action: BACKWARD is INPUT and WEIGHT combined."""
    kind, stage, microbatch = action
    if kind is Kind.BACKWARD:
        return [Action(Kind.INPUT, stage, microbatch), Action(Kind.WEIGHT, stage, microbatch)]
    return [action]
