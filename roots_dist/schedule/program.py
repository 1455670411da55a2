"""The whole program of a schedule, with its sends and receives, and the proof that it can be run.

    schedules.py --compute only--> communication.py --with sends and receives--> check.py: no violations --> executor.py

Called by checks/ before a run starts, by assembly/passes.py for what a rank executes, by `roots schedule`. A program
that deadlocks is refused with what each rank would wait for; unchecked, its ranks would hang until advanced.timeout_s.
"""

from __future__ import annotations

from functools import lru_cache

from roots_dist.errors import UserError
from roots_dist.schedule.actions import InvalidProgram, Program
from roots_dist.schedule.check import DEADLOCK, violations
from roots_dist.schedule.communication import with_communication
from roots_dist.schedule.schedules import SCHEDULES, Schedule, Shape, make

SHOWN = 8
"""Lines of an error; a broken program may have thousands."""


def whole_program(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Program:
    """What each rank does, in order. Raises UserError for an impossible shape, and for a program that cannot be run."""
    program = make(name, ranks, microbatches, chunks)
    if reason := refusal(name, Shape(ranks, microbatches, chunks)):
        raise UserError(
            f"schedule = {name!r}: expected a program that ends with {ranks} ranks and {microbatches} microbatches; "
            f"{reason}. Fix: choose another schedule, or correct its function in schedule/schedules.py"
        )
    return with_communication(program, ranks, ranks * chunks)


def refusal(name: str, shape: Shape) -> str | None:
    """Why the program of a possible shape cannot be run, in one line; None if it can. Played once for each shape."""
    found = _violations(SCHEDULES[name], shape)
    if not found:
        return None
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


@lru_cache(maxsize=1024)
def _violations(schedule: Schedule, shape: Shape) -> tuple[str, ...]:
    """The player takes 2 ms for 4 ranks with 8 microbatches, 0.7 s for 12 with 256."""
    program = schedule.make(shape)
    try:
        program = with_communication(program, shape.ranks, shape.ranks * shape.chunks)
    except InvalidProgram as error:
        return (str(error),)
    return tuple(line for line in violations(program) if line != DEADLOCK)
