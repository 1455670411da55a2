"""The proof of a whole program by simulating it, messages included: what the proof from neighbours must agree with."""

from collections import Counter

from roots_dist.schedule.actions import Action, InvalidProgram, Kind, Program, rank_of, results
from roots_dist.schedule.check import _needs, _num_stages, play
from roots_dist.schedule.communication import RECEIVES, SENDS, other_end


def simulated_violations(program: Program) -> list[str]:
    """Everything that is wrong with a program with communication; empty if the executor may run it.

    Stages and microbatches are those that the program names: every pair must run forward once and backward once.
    """
    found = [*_misplaced(program), *_miscounted(program)]
    try:
        play(program)
    except InvalidProgram as error:
        found += [*_disordered(program), *str(error).splitlines()]  # any action out of order on a rank deadlocks
    return found


def _misplaced(program: Program) -> list[str]:
    return [
        f"rank {rank} runs {action}, but stage {action.stage} lives on rank {rank_of(action.stage, len(program))}"
        for rank, actions in enumerate(program)
        for action in actions
        if rank_of(action.stage, len(program)) != rank
    ]


def _miscounted(program: Program) -> list[str]:
    """Check that each forward, input gradient and weight gradient occurs exactly once, and that sends and receives
    match."""
    counts = Counter(result for actions in program for action in actions for result in results(action))
    num_microbatches = 1 + max((action.microbatch for action in counts), default=-1)
    parts = {Kind.FORWARD: "forward", Kind.INPUT: "gradient of the input", Kind.WEIGHT: "gradient of the weights"}
    found = [
        f"the {part} of stage {stage}, microbatch {i} is computed {counts[Action(kind, stage, i)]} times, expected once"
        for stage in range(_num_stages(program))
        for i in range(num_microbatches)
        for kind, part in parts.items()
        if counts[Action(kind, stage, i)] != 1
    ]
    for action, count in counts.items():
        if action.kind in SENDS + RECEIVES and counts[other_end(action)] != count:
            found.append(f"{action} is posted {count} times, {other_end(action)} {counts[other_end(action)]} times")
    return found


def _disordered(program: Program) -> list[str]:
    """Check that no action precedes what it needs from the same rank (a receive counts from where it is posted)."""
    found = []
    num_stages = _num_stages(program)
    for rank, actions in enumerate(program):
        seen: set[Action] = set()
        for action in actions:
            needs = _needs(action, len(program), num_stages)
            found += [f"rank {rank} runs {action} before {need}" for need in needs if need not in seen]
            seen.update(results(action))
    return found
