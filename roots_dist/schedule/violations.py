"""Prove that a schedule's program runs to its end, from the compute actions of a rank and its neighbours.

    schedules.py --compute actions of some ranks--> violations: none --> communication.py, executor.py

**What is checked where.** A rank checks itself and its neighbours before the first process group, at a cost that does
not grow with the number of ranks. If it refuses, it ends there, and the launcher ends the others. Who starts, submits
or plans a run checks all ranks. The simulator (check.py), which needs all ranks at once and plays messages too, is not
needed for the proof; tests hold that both agree.

**Why neighbours suffice.** Sends and receives are asynchronous, and follow from the compute actions such that they wait
for nothing else (communication.py). So a program hangs if and only if its compute actions wait for one another in a
circle. Take a circle with the fewest messages. It visits no rank twice: the actions of a rank are in one order, so one
of two visits begins before the other ends, and what lies between them could be left out. A circle that visits no rank
twice goes from a rank to a neighbour and back, or once around all ranks.

* Between two neighbours, the circle is found by running only these two (_waiting).
* Around all ranks it can only go if the last rank sends to the first, thus with several stages per rank. It then goes
  in one direction: with three ranks or more only forwards are sent up, and only gradients down. If all ranks run their
  forwards in one order of (chunk, microbatch), the place in this order never falls on the way from rank to rank, and
  rises where the last rank hands chunk c to the first rank's chunk c + 1. So the way never comes back to where it
  began. The same holds for the gradients. Schedules with other orders may end too, but are refused (_differing).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from roots_dist.schedule.actions import Action, Kind, rank_of, results
from roots_dist.schedule.communication import COMPUTE, Computes, needs_of, neighbours, places_of
from roots_dist.schedule.schedules import Shape

PARTS = {Kind.FORWARD: "forward", Kind.INPUT: "gradient of the input", Kind.WEIGHT: "gradient of the weights"}


def violations(computes: Computes, shape: Shape) -> list[str]:
    """Everything that keeps the given ranks from running to their end; empty if nothing does.

    The whole program runs to its end if no rank, given together with its neighbours, has violations. Linear in the
    number of the given actions.
    """
    places = {rank: places_of(actions) for rank, actions in computes.items()}
    found = [line for rank, actions in computes.items() for line in _of_one(rank, actions, places[rank], shape)]
    if found:  # what follows presupposes that each rank is complete and in order
        return found
    for rank in computes:
        for other in neighbours(rank, shape.ranks, shape.stages):
            if rank < other and other in computes:
                found += _waiting(rank, other, computes, places)
                found += _differing(rank, other, computes, shape)
    return found


def _of_one(rank: int, actions: Sequence[Action], places: Mapping[Action, int], shape: Shape) -> Iterator[str]:
    """Check that a rank computes each part of each of its stages and microbatches once, and nothing else, after what it
    needs from itself."""
    for action in actions:
        kind, stage, i = action
        if rank_of(stage, shape.ranks) != rank:
            yield f"rank {rank} runs {action}, but stage {stage} lives on rank {rank_of(stage, shape.ranks)}"
        elif kind not in COMPUTE or not (0 <= stage < shape.stages and 0 <= i < shape.microbatches):
            yield f"rank {rank} runs {action}, which is no computation of this shape"
    num_results = len(actions) + sum(action.kind is Kind.BACKWARD for action in actions)
    if not num_results == len(places) == len(PARTS) * shape.chunks * shape.microbatches:
        yield from _miscounted(rank, actions, shape)
    for n, action in enumerate(actions):
        for need in _needs(action, shape):
            if places.get(need, -1) >= n:
                yield f"rank {rank} runs {action} before {need}"


def _miscounted(rank: int, actions: Sequence[Action], shape: Shape) -> Iterator[str]:
    times = Counter(result for action in actions for result in results(action))
    for stage in range(rank, shape.stages, shape.ranks):
        for i in range(shape.microbatches):
            for kind, part in PARTS.items():
                if (found := times[Action(kind, stage, i)]) != 1:
                    yield f"the {part} of stage {stage}, microbatch {i} is computed {found} times, expected once"


def _needs(action: Action, shape: Shape) -> list[Action]:
    """Actions that the rank itself must have done before an action, even if only through another rank, which needs them
    for a tensor that comes back in a later chunk."""
    kind, stage, i = action
    if kind is Kind.FORWARD:
        return [Action(kind, stage - shape.ranks, i)] if stage >= shape.ranks else []
    if kind in (Kind.BACKWARD, Kind.INPUT):
        behind = stage + shape.ranks
        return [Action(Kind.FORWARD, stage, i), *([Action(Kind.INPUT, behind, i)] if behind < shape.stages else [])]
    return [Action(Kind.INPUT, stage, i)] if kind is Kind.WEIGHT else []


def _waiting(rank: int, other: int, computes: Computes, places: Mapping[int, Mapping[Action, int]]) -> list[str]:
    """Run two neighbours against each other, while all other ranks deliver at once; where each of them hangs."""
    pair = rank, other
    waits = needs_of(computes[rank], places[other]), needs_of(computes[other], places[rank])
    done = [0, 0]
    before = None
    while done != before:
        before = list(done)
        for here, there in ((0, 1), (1, 0)):
            while done[here] < len(waits[here]) and waits[here][done[here]] <= done[there]:
                done[here] += 1
    stuck = [(r, computes[r][n]) for r, n in zip(pair, done) if n < len(computes[r])]
    return [f"rank {r} waits at {action} for {_received(action)}" for r, action in stuck]


def _received(action: Action) -> Action:
    """The receive for which a compute action waits."""
    return action._replace(kind=Kind.RECV_FORWARD if action.kind is Kind.FORWARD else Kind.RECV_BACKWARD)


def _differing(rank: int, other: int, computes: Computes, shape: Shape) -> list[str]:
    """Check that two neighbours on a ring run forwards in one order of (chunk, microbatch), and gradients too."""
    if shape.chunks == 1 or shape.ranks == 2:
        return []
    found = []
    for kinds in ((Kind.FORWARD,), (Kind.BACKWARD, Kind.INPUT)):
        here, there = ([a for a in computes[r] if a.kind in kinds] for r in (rank, other))
        for a, b in zip(here, there):
            if (a.stage // shape.ranks, a.microbatch) != (b.stage // shape.ranks, b.microbatch):
                found.append(f"rank {rank} runs {a} where rank {other} runs {b}, not in one order of chunks")
                break
    return found
