"""Find the rank that caused a hang: from what every rank that answers says of itself, and from those that do not.

    {rank: State} --find_cause--> HangReport: who waits for whom, and whom all wait for --describe_hang--> text

A rank that waits for another is a consequence. The cause is a rank that is waited for and does not answer, or answers
and waits for nobody; if there is none, the ranks wait for each other in a circle, or the network has lost a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from roots_dist.cluster_profile import format_ranges

SHOWN = 8
"""Ranks that are shown waiting, at most."""


@dataclass(frozen=True)
class State:
    """A rank that answers, as it sees itself."""

    rank: int
    name: str
    """`rank 3 (pp0 dp1 tp1, node n1, process 123)`"""
    doing: str
    """Step, phase and action."""
    seconds: float
    """Seconds for which nothing has moved on it."""
    operation: str = ""
    """Operation in which it waits; empty if it waits for no rank."""
    group: str = ""
    """Name of the group that the operation belongs to, equal on all its ranks."""
    title: str = ""
    number: int = 0
    ranks: Sequence[int] = ()
    """Ranks that take part in the operation; the other end, if it is a message."""
    is_message: bool = False
    begun: Mapping[str, int] = field(default_factory=dict)
    """Group -> number of its last operation that this rank has begun."""
    complete: bool = True
    """True if a group that is not in `begun` has begun nothing."""
    at: str = ""
    """File, line and function of the main thread."""
    stacks: str = ""


@dataclass(frozen=True)
class HangReport:
    """The cause of a hang, and who waits for whom."""

    causes: tuple[int, ...]
    """Ranks that do not answer, or else that are waited for and wait for nobody; empty if there are none."""
    waits: Mapping[int, tuple[int, ...]]
    """Rank -> those that it waits for."""
    circle: tuple[int, ...] = ()
    """Ranks that wait for each other."""


def find_cause(states: Mapping[int, State], size: int) -> HangReport:
    """Find the cause. `states` are of the ranks that answered."""
    silent = tuple(rank for rank in range(size) if rank not in states)
    waits = {rank: _awaited(state, states) for rank, state in states.items() if state.operation}
    if silent:
        return HangReport(silent, waits)
    awaited = {there for those in waits.values() for there in those}
    idle = tuple(sorted(rank for rank in awaited if not states[rank].operation))
    if idle:
        return HangReport(idle, waits)
    return HangReport((), waits, _circle(waits))


def _awaited(state: State, states: Mapping[int, State]) -> tuple[int, ...]:
    """Ranks whose part in this rank's operation is missing."""
    others = [rank for rank in state.ranks if rank != state.rank]
    if state.is_message:
        return tuple(others)
    return tuple(rank for rank in others if rank not in states or not _has_begun(states[rank], state))


def _has_begun(other: State, state: State) -> bool:
    """True if the other rank has called the operation in which this one waits, or may have."""
    if state.group not in other.begun:
        return not other.complete
    return other.begun[state.group] >= state.number


def _circle(waits: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """Ranks that wait for each other, by following the first that each waits for."""
    for start in sorted(waits):
        path = [start]
        while (nexts := [there for there in waits.get(path[-1], ()) if there in waits]) and nexts[0] not in path:
            path.append(nexts[0])
        if nexts and nexts[0] in path:
            return tuple(path[path.index(nexts[0]) :])
    return ()


def describe_hang(found: HangReport, states: Mapping[int, State], silent: Mapping[int, str]) -> str:
    """Describe the hang in a few lines, the cause first. `silent`: the name of each rank that does not answer, and how
    its process is."""
    waiting = [states[rank] for rank in sorted(found.waits, key=lambda rank: -states[rank].seconds)]
    doing = (waiting or list(states.values()))[0].doing
    rows = [silent.get(rank) or _idle(states[rank]) for rank in found.causes[:SHOWN]]
    if not found.causes and found.circle:
        rows = [f"ranks {', '.join(map(str, found.circle))} wait for each other"]
    elif not found.causes:
        rows = ["every rank has called the operation that it waits in, so the network or a library has lost a message"]
    head, *more = rows
    lines = [f"✗ hang in {doing}: {head}", *(f"    and {row}" for row in more)]
    lines += [f"    {_waits(state, found.waits[state.rank])}" for state in waiting[:SHOWN]]
    if len(waiting) > SHOWN:
        lines.append(f"    and {len(waiting) - SHOWN} more ranks wait")
    return "\n".join(lines)


def _idle(state: State) -> str:
    return f"{state.name} waits for no rank: {state.doing}, at {state.at}"


def _waits(state: State, awaited: Sequence[int]) -> str:
    number = f" #{state.number}" if state.number else ""
    title = f" of {state.title}" if state.title else ""
    everyone = f" (ranks {format_ranges(sorted({*state.ranks, state.rank}))})" if state.ranks else ""
    whom = f" for rank{'s' * (len(awaited) > 1)} {format_ranges(awaited[:SHOWN])}" if awaited else ""
    waited = f"{state.name} has waited {state.seconds:.0f} s{whom}"
    return f"{waited} in {state.operation}{number}{title}{everyone}: {state.doing}"
