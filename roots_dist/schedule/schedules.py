"""The pipeline schedules, as pure functions from shape to program: what each rank computes, in which order.

    make(name, ranks, microbatches, chunks) --compute only--> passes.py, which derives the communication

Called by assembly/run.py, plan/ and `roots schedule`. Knows no tensors, no time and no transport. All schedules add up
the gradients of the microbatches in the same order, 0, 1, 2, …, so that they agree to the last bit.
"""

from __future__ import annotations

from roots_dist.errors import UserError
from roots_dist.schedule.actions import Action, Kind, Program


def gpipe(num_ranks: int, num_microbatches: int) -> Program:
    """All forwards, then all backwards; every rank holds every microbatch. (Huang et al. 2019)

    rank 0 |F0 F1 F2                   B0 -- B1 -- B2 --
    rank 1 |   F0 F1 F2          B0 -- B1 -- B2 --
    rank 2 |      F0 F1 F2 B0 -- B1 -- B2 --
    """
    return [
        _weave(
            [Action(Kind.FORWARD, rank, i) for i in range(num_microbatches)],
            [Action(Kind.BACKWARD, rank, i) for i in range(num_microbatches)],
            warmup=num_microbatches,
        )
        for rank in range(num_ranks)
    ]


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Program:
    """Rank r holds at most num_ranks - r microbatches. (PipeDream-Flush, Narayanan et al. 2021)

    rank 0 |F0 F1 F2             B0 -- F3 B1 --    B2 --    B3 --
    rank 1 |   F0 F1       B0 -- F2 B1 -- F3 B2 --    B3 --
    rank 2 |      F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 --
    """
    return [
        _weave(
            [Action(Kind.FORWARD, rank, i) for i in range(num_microbatches)],
            [Action(Kind.BACKWARD, rank, i) for i in range(num_microbatches)],
            warmup=num_ranks - rank - 1,
        )
        for rank in range(num_ranks)
    ]


def interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> Program:
    """1F1B over `chunks` stages per rank: the bubble shrinks to 1/chunks. (Narayanan et al. 2021, section 2.2)

    Microbatches travel in groups of num_ranks: a group passes chunk 0 (a), then chunk 1 (b), …; backward in reverse.

    rank 0 |F0a F1a F0b F1b F2a     B0b --- F3a B1b --- F2b B0a --- F3b B1a ---     B2b ---     B3b --- B2a --- B3a ---
    rank 1 |    F0a F1a F0b B0b --- F1b B1b --- F2a B0a --- F3a B1a --- F2b B2b --- F3b B3b --- B2a --- B3a ---
    """
    steps = num_microbatches * chunks

    def at(kind: Kind, rank: int, step: int) -> Action:
        group, within = divmod(step, num_ranks * chunks)
        chunk, place = divmod(within, num_ranks)
        if kind is Kind.BACKWARD:
            chunk = chunks - 1 - chunk
        return Action(kind, chunk * num_ranks + rank, group * num_ranks + place)

    return [
        _weave(
            [at(Kind.FORWARD, rank, step) for step in range(steps)],
            [at(Kind.BACKWARD, rank, step) for step in range(steps)],
            warmup=2 * (num_ranks - rank - 1) + (chunks - 1) * num_ranks,
        )
        for rank in range(num_ranks)
    ]


def zb_h1(num_ranks: int, num_microbatches: int) -> Program:
    """1F1B with the weights' gradients put off into the bubble. (ZB-H1: Qi et al. 2024, "Zero Bubble Pipeline
    Parallelism", section 2)

    Rank r runs its weight passes r microbatches behind its input passes, so gradients reach the ranks before it without
    waiting for them. With them every rank holds up to num_ranks microbatches, as rank 0 of 1F1B does.

    rank 0 |F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
    rank 1 |   F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2 |      F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    program = []
    for rank in range(num_ranks):
        inputs = [Action(Kind.INPUT, rank, i) for i in range(num_microbatches)]
        weights = [Action(Kind.WEIGHT, rank, i) for i in range(num_microbatches)]
        actions = []
        for action in _weave(
            [Action(Kind.FORWARD, rank, i) for i in range(num_microbatches)], inputs, warmup=num_ranks - rank - 1
        ):
            actions.append(action)
            if action.kind is Kind.INPUT and action.microbatch >= rank:
                actions.append(weights[action.microbatch - rank])
        program.append(actions + weights[max(num_microbatches - rank, 0) :])
    return program


def _weave(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then forward and backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    pairs = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
    return forwards[:warmup] + pairs + backwards[len(forwards) - warmup :]


SCHEDULES = {
    "gpipe": lambda ranks, microbatches, chunks: gpipe(ranks, microbatches),
    "1f1b": lambda ranks, microbatches, chunks: one_f_one_b(ranks, microbatches),
    "interleaved": interleaved,
    "zb-h1": lambda ranks, microbatches, chunks: zb_h1(ranks, microbatches),
}
"""name -> (num_ranks, num_microbatches, chunks) -> program. The names are those of `parallel.schedule`."""


def problem(name: str, num_ranks: int, num_microbatches: int, chunks: int) -> str | None:
    """Why this shape cannot be scheduled, in one line with its remedy; None if it can."""
    if name not in SCHEDULES:
        return f"schedule = {name!r}: expected one of {', '.join(SCHEDULES)}"
    for field, value in (("ranks", num_ranks), ("microbatches", num_microbatches), ("chunks", chunks)):
        if value < 1:
            return f"{field} = {value}: expected at least 1"
    if name != "interleaved" and chunks != 1:
        return f"chunks = {chunks}: expected 1 with the schedule {name}. Fix: set chunks to 1, or choose interleaved"
    if name == "interleaved" and chunks == 1:
        return "chunks = 1: expected at least 2 with the schedule interleaved. Fix: raise chunks, or choose 1f1b"
    if name == "interleaved" and num_microbatches % num_ranks != 0:
        above = -(-num_microbatches // num_ranks) * num_ranks
        return (
            f"microbatches = {num_microbatches}: expected a multiple of the {num_ranks} pipeline ranks with the "
            f"schedule interleaved. Fix: use {above} microbatches, or choose 1f1b"
        )
    return None


def make(name: str, num_ranks: int, num_microbatches: int, chunks: int = 1) -> Program:
    """The compute-only program of a schedule by name. Raises UserError for an impossible shape."""
    reason = problem(name, num_ranks, num_microbatches, chunks)
    if reason is not None:
        raise UserError(reason)
    return SCHEDULES[name](num_ranks, num_microbatches, chunks)
