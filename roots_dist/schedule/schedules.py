"""The pipeline schedules: pure functions from a shape and a rank to the compute actions of that rank in order, in one
table.

    SCHEDULES[name].of_rank(rank, shape) --compute only--> program.py, which derives the communication

Config, checks, planner, bounds, drawing and tests read SCHEDULES; nothing else refers to a schedule by name. Knows no
tensors and no transport. A rank can be listed without the others, so that a rank of a large world does not list the
world. All schedules accumulate the gradients of the microbatches in the same order, 0, 1, 2, …, so that they agree to
the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from roots_dist.errors import UserError
from roots_dist.schedule.actions import Action, Kind, Program
from roots_dist.schedule.check import Times


class Shape(NamedTuple):
    """Shape of a pipeline. chunks: number of virtual stages per rank."""

    ranks: int
    microbatches: int
    chunks: int = 1

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Everything that is known about one schedule. Formulas that are unknown are None, and are not shown."""

    title: str
    actions: Callable[..., list[Action]]
    """Function of a rank, and the numbers of ranks, of microbatches and, with `virtual_stages`, of chunks: the compute
    actions of this rank in order. Its docstring has a picture of all ranks."""
    bubble_time: Callable[[Shape, Times], float] | None = None
    """Time lost in a step with equal stages and free transfers; the bubble is this over the ideal time."""
    peak: Callable[[Shape, int], int] | None = None
    """Number of activations of a stage that a rank holds at once, with many microbatches."""
    splits_backward: bool = False
    """True if gradients of inputs and weights are separate actions, INPUT and WEIGHT instead of BACKWARD."""
    virtual_stages: bool = False
    """True if each rank holds several stages; the other schedules have one stage per rank."""
    whole_groups: bool = False
    """True if the microbatches of a step must be a multiple of the ranks."""
    other_names: tuple[str, ...] = ()
    """Words of other systems for it."""
    problem: Callable[[Shape], str | None] | None = None
    """The reason why a shape cannot be scheduled, in one line with its fix, beyond the rules for all schedules."""

    def of_rank(self, rank: int, shape: Shape) -> list[Action]:
        """Compute actions of one rank, for a shape that `problem` accepts."""
        return self.actions(rank, *shape) if self.virtual_stages else self.actions(rank, *shape[:2])


def gpipe(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """All forwards, then all backwards; every rank holds every microbatch. (Huang et al. 2019)

    rank 0 |F0 F1 F2                   B0 -- B1 -- B2 --
    rank 1 |   F0 F1 F2          B0 -- B1 -- B2 --
    rank 2 |      F0 F1 F2 B0 -- B1 -- B2 --
    """
    return _weave(
        [Action(Kind.FORWARD, rank, i) for i in range(num_microbatches)],
        [Action(Kind.BACKWARD, rank, i) for i in range(num_microbatches)],
        warmup=num_microbatches,
    )


def one_f_one_b(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """Rank r holds at most num_ranks - r microbatches. (PipeDream-Flush, Narayanan et al. 2021)

    rank 0 |F0 F1 F2             B0 -- F3 B1 --    B2 --    B3 --
    rank 1 |   F0 F1       B0 -- F2 B1 -- F3 B2 --    B3 --
    rank 2 |      F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 --
    """
    return _weave(
        [Action(Kind.FORWARD, rank, i) for i in range(num_microbatches)],
        [Action(Kind.BACKWARD, rank, i) for i in range(num_microbatches)],
        warmup=num_ranks - rank - 1,
    )


def interleaved(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> list[Action]:
    """1F1B over `chunks` stages per rank: the bubble shrinks to 1/chunks. (Narayanan et al. 2021, section 2.2)

    Microbatches run in groups of num_ranks: a group passes chunk 0 (a), then chunk 1 (b), …; backward in reverse.

    rank 0 |F0a F1a F0b F1b F2a     B0b --- F3a B1b --- F2b B0a --- F3b B1a ---     B2b ---     B3b --- B2a --- B3a ---
    rank 1 |    F0a F1a F0b B0b --- F1b B1b --- F2a B0a --- F3a B1a --- F2b B2b --- F3b B3b --- B2a --- B3a ---
    """
    stages = range(rank, num_ranks * chunks, num_ranks)
    groups = [range(first, first + num_ranks) for first in range(0, num_microbatches, num_ranks)]
    return _weave(
        [Action(Kind.FORWARD, stage, i) for group in groups for stage in stages for i in group],
        [Action(Kind.BACKWARD, stage, i) for group in groups for stage in reversed(stages) for i in group],
        warmup=2 * (num_ranks - rank - 1) + (chunks - 1) * num_ranks,
    )


def zb_h1(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """1F1B with weight gradients deferred into the bubble. (ZB-H1: Qi et al. 2024, "Zero Bubble Pipeline
    Parallelism", section 2)

    Rank r runs its weight passes r microbatches behind its input passes, so that gradients reach earlier ranks without
    waiting for them. Every rank then holds up to num_ranks microbatches, like rank 0 of 1F1B.

    rank 0 |F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
    rank 1 |   F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2 |      F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    inputs = [Action(Kind.INPUT, rank, i) for i in range(num_microbatches)]
    weights = [Action(Kind.WEIGHT, rank, i) for i in range(num_microbatches)]
    actions = []
    for action in _weave(
        [Action(Kind.FORWARD, rank, i) for i in range(num_microbatches)], inputs, warmup=num_ranks - rank - 1
    ):
        actions.append(action)
        if action.kind is Kind.INPUT and action.microbatch >= rank:
            actions.append(weights[action.microbatch - rank])
    return actions + weights[max(num_microbatches - rank, 0) :]


def _weave(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then forward and backward alternating, then the remaining backwards."""
    warmup = min(warmup, len(forwards))
    pairs = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
    return forwards[:warmup] + pairs + backwards[len(forwards) - warmup :]


def _zero_bubble_time(shape: Shape, times: Times) -> float:
    """(p - 1)(T_F + T_B - T_W): Qi et al. 2024, table 2, for T_W at most T_F and T_B (a longer one fills no more than
    the shortest of the three) and at least p microbatches (fewer have fewer weight passes to fill the bubble)."""
    f, b, w = times.forward, times.input, times.weight
    return (shape.ranks - 1) * (f + b) - (min(shape.ranks, shape.microbatches) - 1) * min(f, b, w)


def _fill_and_drain_time(shape: Shape, times: Times) -> float:
    """(p - 1)(T_F + T_B) for stages that are 1/chunks as long: Narayanan et al. 2021, sections 2.2.1 and 2.2.2."""
    return (shape.ranks - 1) * (times.forward + times.input + times.weight)


STAGES = "virtual stages"
"""Stages per rank, in the words of parallel.virtual_stages and of `roots schedule --virtual-stages`."""
DEFAULT = "1f1b"
SCHEDULES = {
    "gpipe": Schedule(
        title="GPipe",
        actions=gpipe,
        bubble_time=_fill_and_drain_time,
        peak=lambda shape, rank: shape.microbatches,
    ),
    "1f1b": Schedule(
        title="1F1B",
        actions=one_f_one_b,
        other_names=("pipedream", "pipedream_flush"),
        bubble_time=_fill_and_drain_time,
        peak=lambda shape, rank: shape.ranks - rank,
    ),
    "interleaved": Schedule(
        title="Interleaved 1F1B",
        actions=interleaved,
        other_names=("interleaved_1f1b",),
        bubble_time=_fill_and_drain_time,
        peak=lambda shape, rank: 2 * (shape.ranks - rank - 1) + (shape.chunks - 1) * shape.ranks + 1,
        virtual_stages=True,
        whole_groups=True,
    ),
    "zb-h1": Schedule(
        title="ZB-H1",
        actions=zb_h1,
        other_names=("zb", "zero_bubble"),
        bubble_time=_zero_bubble_time,
        peak=lambda shape, rank: shape.ranks,
        splits_backward=True,
    ),
}
"""Values of `parallel.schedule`."""


def record_of(schedule: str | Schedule) -> Schedule:
    """The record of a name of the table, or of an extension's schedule itself."""
    return SCHEDULES[schedule] if isinstance(schedule, str) else schedule


def problem(name: str | Schedule, num_ranks: int, num_microbatches: int, chunks: int) -> str | None:
    """The reason why this shape cannot be scheduled, in one line with its fix; None if it can."""
    if isinstance(name, str) and name not in SCHEDULES:
        return f"schedule = {name!r}: expected one of {', '.join(SCHEDULES)}. Fix: choose one of them"
    for field, value in (("ranks", num_ranks), ("microbatches", num_microbatches), (STAGES, chunks)):
        if value < 1:
            return f"{field} = {value}: expected at least 1"
    schedule = record_of(name)
    name = name if isinstance(name, str) else name.title
    if chunks != 1 and not schedule.virtual_stages:
        others = " or ".join(other for other, s in SCHEDULES.items() if s.virtual_stages)
        return f"{STAGES} = {chunks}: expected 1 with the schedule {name}. Fix: use 1, or choose {others}"
    if chunks == 1 and schedule.virtual_stages:
        return f"{STAGES} = 1: expected at least 2 with the schedule {name}. Fix: use 2 or more, or choose {DEFAULT}"
    if schedule.whole_groups and num_microbatches % num_ranks:
        above = -(-num_microbatches // num_ranks) * num_ranks
        return (
            f"microbatches = {num_microbatches}: expected a multiple of the {num_ranks} pipeline ranks with the "
            f"schedule {name}. Fix: use {above} microbatches, or choose {DEFAULT}"
        )
    return schedule.problem and schedule.problem(Shape(num_ranks, num_microbatches, chunks))


def make(name: str | Schedule, num_ranks: int, num_microbatches: int, chunks: int = 1) -> Program:
    """The compute-only program of a named schedule, all ranks of it. Raises UserError for an impossible shape."""
    reason = problem(name, num_ranks, num_microbatches, chunks)
    if reason is not None:
        raise UserError(reason)
    shape = Shape(num_ranks, num_microbatches, chunks)
    return [record_of(name).of_rank(rank, shape) for rank in range(num_ranks)]


def expected_bubble(
    name: str | Schedule, num_ranks: int, num_microbatches: int, chunks: int = 1, times: Times = Times()
) -> float | None:
    """The bubble in closed form, as a fraction of the ideal time, with equal stages and free transfers; None if
    unknown."""
    bubble_time = record_of(name).bubble_time
    if bubble_time is None:
        return None
    whole = num_microbatches * chunks * (times.forward + times.input + times.weight)
    return bubble_time(Shape(num_ranks, num_microbatches, chunks), times) / whole


def expected_peak(name: str | Schedule, num_ranks: int, num_microbatches: int, chunks: int = 1) -> list[int] | None:
    """Largest number of activations of a stage that each rank holds at once, in closed form; None if unknown.

    With v chunks a stage is 1/v of a rank.
    """
    peak = record_of(name).peak
    if peak is None:
        return None
    shape = Shape(num_ranks, num_microbatches, chunks)
    return [min(peak(shape, rank), num_microbatches * chunks) for rank in range(num_ranks)]
