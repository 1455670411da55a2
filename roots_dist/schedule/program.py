"""The complete program of a schedule with its sends and receives, and the check that it runs to its end.

    schedules.py --compute only--> communication.py --with sends and receives--> check.py: no violations --> executor.py

Used by checks/ before a run starts, by assembly/passes.py for execution, and by `roots schedule`. A program that
deadlocks is refused with what each rank would wait for; otherwise its ranks would hang until advanced.timeout_s.
"""

from __future__ import annotations

from functools import lru_cache

from roots_dist.errors import UserError
from roots_dist.schedule.actions import InvalidProgram, Program
from roots_dist.schedule.check import DEADLOCK, violations
from roots_dist.schedule.communication import with_communication
from roots_dist.schedule.schedules import SCHEDULES, Schedule, Shape, make

SHOWN = 8
"""Number of lines of an error that are shown; an invalid program may have thousands."""


def whole_program(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Program:
    """Actions of each rank, in order. Raises UserError for an impossible shape, and for a program that deadlocks."""
    program = make(name, ranks, microbatches, chunks)
    if reason := refusal(name, Shape(ranks, microbatches, chunks)):
        raise UserError(
            f"schedule = {name!r}: expected a program that ends with {ranks} ranks and {microbatches} microbatches; "
            f"{reason}. Fix: choose another schedule, or correct its function in schedule/schedules.py"
        )
    return with_communication(program, ranks, ranks * chunks)


def refusal(name: str, shape: Shape) -> str | None:
    """Why the program of a possible shape cannot run, in one line; None if it can. Each shape is simulated once."""
    found = _violations(SCHEDULES[name], shape)
    if not found:
        return None
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


@lru_cache(maxsize=1024)
def _violations(schedule: Schedule, shape: Shape) -> tuple[str, ...]:
    """Violations of a schedule's program. The simulation takes 2 ms for 4 ranks with 8 microbatches, 0.7 s for 12 with
    256."""
    program = schedule.make(shape)
    try:
        program = with_communication(program, shape.ranks, shape.ranks * shape.chunks)
    except InvalidProgram as error:
        return (str(error),)
    return tuple(line for line in violations(program) if line != DEADLOCK)
