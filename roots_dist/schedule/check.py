"""Simulate a program of all ranks without tensors: how many activations it holds, how long it takes, where it hangs.

    communication.py --with sends and receives--> play: timeline, peak, bubble --> draw.py, runs/plan/

The simulator knows nothing of the schedules; the closed formulas in schedules.py come from the papers. Tests compare
the two.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from roots_dist.schedule.actions import Action, InvalidProgram, Kind, Program, results
from roots_dist.schedule.communication import COMPUTE, SENDS, Channel, channel_of, other_end


@dataclass(frozen=True, kw_only=True)
class Times:
    """Duration of each kind of action, in any unit. BACKWARD takes input + weight."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    transfer: float = 0.0
    stages: tuple[float, ...] = ()
    """Cost of each stage, as a factor on the durations; if empty, all stages cost the same."""
    exact: Mapping[tuple[Kind, int], float] | None = None
    """Duration of each kind of action in each stage, which replaces all durations except transfer."""

    def of(self, action: Action) -> float:
        if self.exact is not None:
            return self.exact[action.kind, action.stage]
        scale = self.stages[action.stage] if self.stages else 1.0
        return (
            scale
            * {
                Kind.FORWARD: self.forward,
                Kind.BACKWARD: self.input + self.weight,
                Kind.INPUT: self.input,
                Kind.WEIGHT: self.weight,
            }[action.kind]
        )


class Span(NamedTuple):
    """An action and the time it takes."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Played:
    """The result of a simulation."""

    times: Times
    num_stages: int
    timeline: list[list[Span]]
    """Compute actions of each rank, in order."""
    transfers: dict[Channel, list[Span]]
    """Sends of each channel, from the moment that both ends are ready until the tensor has arrived."""
    peak: list[int]
    """Largest number of activations that each rank holds at once: a forward adds one, BACKWARD or WEIGHT removes one.
    """

    @property
    def makespan(self) -> float:
        return max(spans[-1].end for spans in self.timeline if spans)

    @property
    def ideal(self) -> float:
        """Time of the busiest rank if it never waited."""
        return max(sum(self.times.of(span.action) for span in spans) for spans in self.timeline)

    @property
    def bubble(self) -> float:
        """Time lost, as a fraction of the ideal time: (p - 1) / m for 1F1B."""
        return (self.makespan - self.ideal) / self.ideal

    @property
    def bubble_share(self) -> float:
        """Time lost, as a fraction of the total time: (p - 1) / (m + p - 1) for 1F1B."""
        return (self.makespan - self.ideal) / self.makespan


def play(program: Program, times: Times = Times()) -> Played:
    """Simulate a program with communication. Raises InvalidProgram if it deadlocks.

    A rank computes one action at a time. Sends and receives take none of its time; a transfer begins when both ends
    have posted it and the channel is free. A compute action waits for the tensors that it needs from other ranks.
    """
    machine = _Machine(program, times)
    runnable = deque(range(len(program)))
    while runnable:
        runnable.extend(machine.advance(runnable.popleft()))
    stuck = [line for rank in range(len(program)) for line in machine.why_stuck(rank)]
    if stuck:
        raise InvalidProgram("\n".join(["deadlock:", *stuck]))
    peak = [_peak(actions) for actions in program]
    return Played(times, machine.num_stages, machine.timeline, dict(machine.transfers), peak)


@dataclass
class _Machine:
    """State of the simulation: the position of each rank, completed actions, pending transfers."""

    program: Program
    times: Times
    done: dict[Action, float] = field(default_factory=dict)  # compute action or arrived receive -> when
    transfers: dict[Channel, list[Span]] = field(default_factory=lambda: defaultdict(list))
    posted: dict[Channel, tuple[deque[tuple[Action, float]], deque[tuple[Action, float]]]] = field(
        default_factory=lambda: defaultdict(lambda: (deque(), deque()))
    )
    waiting: dict[Action, list[int]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.num_ranks = len(self.program)
        self.num_stages = _num_stages(self.program)
        self.cursor = [0] * self.num_ranks
        self.clock = [0.0] * self.num_ranks
        self.timeline: list[list[Span]] = [[] for _ in self.program]

    def advance(self, rank: int) -> list[int]:
        """Advance this rank as far as possible; return the ranks that it unblocks."""
        woken: list[int] = []
        actions = self.program[rank]
        while self.cursor[rank] < len(actions):
            action = actions[self.cursor[rank]]
            start = self.clock[rank]
            for need in _needs(action, self.num_ranks, self.num_stages):
                if need not in self.done:
                    self.waiting[need].append(rank)
                    return woken
                start = max(start, self.done[need])
            if action.kind in COMPUTE:
                self.clock[rank] = start + self.times.of(action)
                self.timeline[rank].append(Span(action, start, self.clock[rank]))
                for result in results(action):
                    woken += self.finish(result, self.clock[rank])
            else:
                woken += self.post(action, self.clock[rank])
            self.cursor[rank] += 1
        return woken

    def post(self, action: Action, when: float) -> list[int]:
        """Post one end of a transfer; the n-th send of a channel is matched with its n-th receive."""
        channel = channel_of(action, self.num_ranks)
        sends, receives = self.posted[channel]
        (sends if action.kind in SENDS else receives).append((action, when))
        if not (sends and receives):
            return []
        (send, sent), (receive, ready) = sends.popleft(), receives.popleft()
        if other_end(send) != receive:
            raise InvalidProgram(
                f"rank {channel.sender} sends {send} where rank {channel.receiver} receives {receive}: a channel is "
                f"first in, first out"
            )
        before = self.transfers[channel]
        start = max(sent, ready, before[-1].end if before else 0.0)
        before.append(Span(send, start, start + self.times.transfer))
        return self.finish(receive, before[-1].end)

    def finish(self, action: Action, when: float) -> list[int]:
        self.done[action] = when
        return self.waiting.pop(action, [])

    def why_stuck(self, rank: int) -> list[str]:
        if self.cursor[rank] == len(self.program[rank]):
            return []
        action = self.program[rank][self.cursor[rank]]
        missing = [n for n in _needs(action, self.num_ranks, self.num_stages) if n not in self.done]
        return [f"rank {rank} waits at {action} for {', '.join(map(str, missing))}"]


def _needs(action: Action, num_ranks: int, num_stages: int) -> list[Action]:
    """Actions that must be done, or whose message must have arrived, before an action; the gradient of a stage's input
    counts as INPUT."""
    kind, stage, microbatch = action
    local = num_ranks == 1  # neighbours in the model live on the same rank: nothing travels
    if kind is Kind.FORWARD:
        if stage == 0:
            return []
        return [Action(kind, stage - 1, microbatch) if local else Action(Kind.RECV_FORWARD, stage, microbatch)]
    if kind in (Kind.BACKWARD, Kind.INPUT):
        own = Action(Kind.FORWARD, stage, microbatch)
        if stage == num_stages - 1:
            return [own]
        behind = Action(Kind.INPUT, stage + 1, microbatch) if local else Action(Kind.RECV_BACKWARD, stage, microbatch)
        return [own, behind]
    if kind in (Kind.WEIGHT, Kind.SEND_BACKWARD):
        return [Action(Kind.INPUT, stage, microbatch)]
    return [Action(Kind.FORWARD, stage, microbatch)] if kind is Kind.SEND_FORWARD else []


def _peak(actions: list[Action]) -> int:
    held = peak = 0
    for action in actions:
        held += {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.WEIGHT: -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak


def _num_stages(program: Program) -> int:
    return 1 + max((action.stage for actions in program for action in actions), default=-1)
