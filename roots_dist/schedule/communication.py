"""Derive the communication of a schedule: the compute actions determine which tensors are sent, and when.

    schedules.py --compute only--> with_communication --> check.py plays it, executor.py runs it

Every ordered pair of ranks has one channel for activations and one for gradients, each with its own process group. A
channel has no tags and is first in, first out: one end posts its receives in the order in which the other sends.
Between stages of one rank nothing is sent; the executor passes the tensors on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from roots_dist.schedule.actions import Action, InvalidProgram, Kind, Program, rank_of

SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT)

_OTHER_END = {
    Kind.SEND_FORWARD: (Kind.RECV_FORWARD, +1),
    Kind.RECV_FORWARD: (Kind.SEND_FORWARD, -1),
    Kind.SEND_BACKWARD: (Kind.RECV_BACKWARD, -1),
    Kind.RECV_BACKWARD: (Kind.SEND_BACKWARD, +1),
}


class Channel(NamedTuple):
    """A one-way queue between two pipeline ranks: activations (Kind.FORWARD) or their gradients (Kind.BACKWARD)."""

    sender: int
    receiver: int
    kind: Kind


def other_end(action: Action) -> Action:
    """The receive that matches a send, or the send that matches a receive."""
    kind, step = _OTHER_END[action.kind]
    return Action(kind, action.stage + step, action.microbatch)


def channel_of(action: Action, num_ranks: int) -> Channel:
    """Channel of a send or receive."""
    here, there = rank_of(action.stage, num_ranks), rank_of(other_end(action).stage, num_ranks)
    kind = Kind.FORWARD if action.kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD) else Kind.BACKWARD
    return Channel(here, there, kind) if action.kind in SENDS else Channel(there, here, kind)


def channels(program: Program, num_ranks: int) -> list[Channel]:
    """Every channel that a program uses, in the same order on all ranks, in which their groups are created."""
    used = {channel_of(action, num_ranks) for actions in program for action in actions if action.kind not in COMPUTE}
    return sorted(used, key=_order)


def with_communication(program: Program, num_ranks: int, num_stages: int) -> Program:
    """Add the sends and receives that a compute-only program needs.

    A send directly follows the action that computes its tensor. A receive is posted one compute action before its use,
    so that the transfer overlaps with computation, or earlier if a later tensor of the same channel is used before it.
    Raises InvalidProgram if a tensor is sent that no action uses.
    """
    sent: dict[Channel, list[Action]] = defaultdict(list)  # the receives of a channel, in the order of its sends
    uses: dict[Action, int] = {}  # a receive -> index of the compute action that waits for it
    for actions in program:
        for index, action in enumerate(actions):
            for send in _sends(action, num_ranks, num_stages):
                sent[channel_of(send, num_ranks)].append(other_end(send))
            for receive in _receives(action, num_ranks, num_stages):
                uses[receive] = index

    posts: list[dict[int, list[Action]]] = [defaultdict(list) for _ in program]
    for channel in sorted(sent, key=_order):
        place = len(program[channel.receiver])
        for receive in reversed(sent[channel]):
            if receive not in uses:
                raise InvalidProgram(f"{other_end(receive)} is sent, but nothing on rank {channel.receiver} uses it")
            place = min(place, max(uses[receive] - 1, 0))
            posts[channel.receiver][place].insert(0, receive)

    result = []
    for rank, actions in enumerate(program):
        full: list[Action] = []
        for index, action in enumerate(actions):
            full += posts[rank][index]
            full.append(action)
            full += _sends(action, num_ranks, num_stages)
        result.append(full)
    return result


def receipts(program: Program) -> list[dict[Action, list[Action]]]:
    """For each rank, the sends that are known to have arrived once a receive completes. The program must include
    communication.

    A rank that continues after a computation has received its input, so whatever it sends later proves the arrival. A
    backend that cannot tell when a send is complete (gloo) then need not keep all tensors of a step until its end.
    """
    num_ranks = len(program)
    place = {action: index for actions in program for index, action in enumerate(actions)}  # on its own rank
    receives: dict[tuple[int, int], list[Action]] = defaultdict(list)  # (sender, receiver) -> in the order of posting
    for actions in program:
        for action in actions:
            if action.kind in RECEIVES:
                channel = channel_of(action, num_ranks)
                receives[channel.sender, channel.receiver].append(action)
    found: list[dict[Action, list[Action]]] = [defaultdict(list) for _ in program]
    for rank, actions in enumerate(program):
        looked_at: dict[Channel, int] = defaultdict(int)  # later sends of a channel are proved by later receives
        for send in actions:
            if send.kind not in SENDS:
                continue
            channel = channel_of(send, num_ranks)
            proofs = receives[channel.receiver, rank]
            used = _use(other_end(send), place)
            while looked_at[channel] < len(proofs) and place[other_end(proofs[looked_at[channel]])] < used:
                looked_at[channel] += 1
            if looked_at[channel] < len(proofs):
                found[rank][proofs[looked_at[channel]]].append(send)
    return found


def _use(receive: Action, place: Mapping[Action, int]) -> int:
    """Index of the action that uses a received tensor."""
    if receive.kind is Kind.RECV_FORWARD:
        return place[receive._replace(kind=Kind.FORWARD)]
    whole = receive._replace(kind=Kind.BACKWARD)
    return place[whole if whole in place else receive._replace(kind=Kind.INPUT)]


def _order(channel: Channel) -> tuple[str, int, int]:
    return channel.kind.value, channel.sender, channel.receiver


def _sends(action: Action, num_ranks: int, num_stages: int) -> list[Action]:
    """Sends that follow a compute action."""
    if num_ranks == 1:
        return []
    _, stage, microbatch = action
    if action.kind is Kind.FORWARD and stage < num_stages - 1:
        return [Action(Kind.SEND_FORWARD, stage, microbatch)]
    if action.kind in (Kind.BACKWARD, Kind.INPUT) and stage > 0:
        return [Action(Kind.SEND_BACKWARD, stage, microbatch)]
    return []


def _receives(action: Action, num_ranks: int, num_stages: int) -> list[Action]:
    """Receives that must complete before a compute action."""
    if num_ranks == 1:
        return []
    _, stage, microbatch = action
    if action.kind is Kind.FORWARD and stage > 0:
        return [Action(Kind.RECV_FORWARD, stage, microbatch)]
    if action.kind in (Kind.BACKWARD, Kind.INPUT) and stage < num_stages - 1:
        return [Action(Kind.RECV_BACKWARD, stage, microbatch)]
    return []
