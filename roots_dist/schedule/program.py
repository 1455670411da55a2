"""The program of a schedule with its sends and receives, of one rank or of all, and the check that it runs to its end.

    schedules.py --compute only--> violations.py: none --> communication.py --with sends and receives--> executor.py

Used by checks/ before a run starts, by assembly/passes.py for execution, and by `roots schedule`. A program that
deadlocks is refused with what each rank would wait for; otherwise its ranks would hang until advanced.timeout_s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from roots_dist.errors import UserError
from roots_dist.schedule.actions import Action, Program
from roots_dist.schedule.communication import Computes, neighbours, receipts, with_communication
from roots_dist.schedule.schedules import Schedule, Shape, problem, record_of
from roots_dist.schedule.violations import violations

SHOWN = 8
"""Number of lines of an error that are shown; an invalid program may have thousands."""


class RankProgram(NamedTuple):
    """The actions that one rank executes."""

    actions: Sequence[Action]
    """Actions in order, with sends and receives."""
    receipts: Mapping[Action, Sequence[Action]]
    """Receive -> the sends that have arrived once it completes."""


def rank_program(name: str | Schedule, rank: int, shape: Shape) -> RankProgram:
    """Program of one rank, at a cost that does not grow with the number of ranks. Raises UserError for an impossible
    shape, and for a program in which this rank or its neighbours hang."""
    _require(name, shape, rank)
    return complete(rank, _near(record_of(name), rank, shape), shape.ranks, shape.stages)


def complete(rank: int, computes: Computes, num_ranks: int, num_stages: int) -> RankProgram:
    """Derive the program of one rank from the compute actions of the rank and its neighbours."""
    actions = with_communication(rank, computes, num_ranks, num_stages)
    return RankProgram(actions, receipts(rank, actions, computes, num_ranks))


def whole_program(name: str | Schedule, ranks: int, microbatches: int, chunks: int = 1) -> Program:
    """Actions of each rank, in order. Raises UserError for an impossible shape, and for a program that deadlocks."""
    shape = Shape(ranks, microbatches, chunks)
    _require(name, shape)
    computes = _all(record_of(name), shape)
    return [with_communication(rank, computes, ranks, shape.stages) for rank in range(ranks)]


def refusal(name: str | Schedule, shape: Shape, rank: int | None = None) -> str | None:
    """The reason why the program of a possible shape cannot run, in one line; None if it can.

    With `rank`, this pipeline rank and its neighbours are looked at, without it, all ranks. Each shape is checked once.
    """
    found = _violations(record_of(name), shape, rank)
    if not found:
        return None
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _require(name: str | Schedule, shape: Shape, rank: int | None = None) -> None:
    if reason := problem(name, *shape):
        raise UserError(reason)
    if reason := refusal(name, shape, rank):
        word = name if isinstance(name, str) else name.title
        raise UserError(
            f"schedule = {word!r}: expected a program that ends with {shape.ranks} ranks and {shape.microbatches} "
            f"microbatches; {reason}. Fix: choose another schedule, or correct its function in schedule/schedules.py"
        )


@lru_cache(maxsize=1024)
def _violations(schedule: Schedule, shape: Shape, rank: int | None) -> tuple[str, ...]:
    computes = _all(schedule, shape) if rank is None else _near(schedule, rank, shape)
    return tuple(violations(computes, shape))


def _near(schedule: Schedule, rank: int, shape: Shape) -> Computes:
    """Compute actions of a rank and its neighbours."""
    return {r: schedule.of_rank(r, shape) for r in (rank, *neighbours(rank, shape.ranks, shape.stages))}


def _all(schedule: Schedule, shape: Shape) -> Computes:
    return {rank: schedule.of_rank(rank, shape) for rank in range(shape.ranks)}
