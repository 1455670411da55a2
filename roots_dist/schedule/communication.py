"""Derive the communication of a schedule: the compute actions determine which tensors are sent, and when.

    schedules.py --a rank's and its neighbours' compute actions--> with_communication, receipts --> executor.py

Every ordered pair of ranks has one channel for activations and one for gradients. A channel has no tags and is first
in, first out: one end posts its receives in the order in which the other sends. Between stages of one rank nothing is
sent; the executor passes the tensors on.

What a rank sends and receives follows from its own compute actions and those of its neighbours, which hold the stages
before and behind its own. No other rank is looked at, so the cost is linear in the actions of one rank, however many
ranks there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from roots_dist.schedule.actions import Action, InvalidProgram, Kind, rank_of, results

Computes = Mapping[int, Sequence[Action]]
"""Compute actions in order, by pipeline rank: those of a rank and its neighbours, or of all ranks."""

SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT)

_OTHER_END = {
    Kind.SEND_FORWARD: (Kind.RECV_FORWARD, +1),
    Kind.RECV_FORWARD: (Kind.SEND_FORWARD, -1),
    Kind.SEND_BACKWARD: (Kind.RECV_BACKWARD, -1),
    Kind.RECV_BACKWARD: (Kind.SEND_BACKWARD, +1),
}
_COMPUTED = {
    Kind.SEND_FORWARD: Kind.FORWARD,
    Kind.RECV_FORWARD: Kind.FORWARD,
    Kind.SEND_BACKWARD: Kind.INPUT,
    Kind.RECV_BACKWARD: Kind.INPUT,
}
"""Kind of a message -> kind of the action of the same stage that makes its tensor (send) or uses it (receive); BACKWARD
counts as INPUT.
"""


class Direction(NamedTuple):
    """Properties of channels that share a process group: their kind, and whether they lead to a higher rank."""

    kind: Kind
    up: bool


class Channel(NamedTuple):
    """A one-way queue between two pipeline ranks: activations (Kind.FORWARD) or their gradients (Kind.BACKWARD)."""

    sender: int
    receiver: int
    kind: Kind

    @property
    def direction(self) -> Direction:
        return Direction(self.kind, self.sender < self.receiver)


def other_end(action: Action) -> Action:
    """The receive that matches a send, or the send that matches a receive."""
    kind, step = _OTHER_END[action.kind]
    return Action(kind, action.stage + step, action.microbatch)


def channel_of(action: Action, num_ranks: int) -> Channel:
    """Channel of a send or receive."""
    kind, stage, _ = action
    step = _OTHER_END[kind][1]
    here, there = rank_of(stage, num_ranks), rank_of(stage + step, num_ranks)
    tensors = Kind.FORWARD if _COMPUTED[kind] is Kind.FORWARD else Kind.BACKWARD
    return Channel(here, there, tensors) if kind in SENDS else Channel(there, here, tensors)


def directions(num_ranks: int, num_stages: int) -> list[Direction]:
    """Directions of all channels of a pipeline, in the same order on all ranks, in which their groups are created.

    Activations go up and gradients down; with several stages per rank, the last rank also hands over to the first.
    """
    if num_ranks == 1:
        return []
    straight = [Direction(Kind.BACKWARD, up=False), Direction(Kind.FORWARD, up=True)]
    around = [Direction(Kind.BACKWARD, up=True), Direction(Kind.FORWARD, up=False)]
    return straight + around if num_stages > num_ranks else straight


def neighbours(rank: int, num_ranks: int, num_stages: int) -> list[int]:
    """The other ranks that hold a stage directly before or behind a stage of this rank: at most two."""
    around = (stage + step for stage in range(rank, num_stages, num_ranks) for step in (-1, 1))
    ranks = {rank_of(stage, num_ranks) for stage in around if 0 <= stage < num_stages}
    return sorted(ranks - {rank})


def with_communication(rank: int, computes: Computes, num_ranks: int, num_stages: int) -> list[Action]:
    """Add the sends and receives that a rank needs to its compute actions. `computes` has the rank and its neighbours.

    A send directly follows the action that computes its tensor. A receive is posted one compute action before its use,
    so that the transfer overlaps with computation, or earlier if a later tensor of the same channel is used before it;
    but not before an action that its sender waits for. On a GPU a posted receive is a kernel that spins: if anything in
    between waits for the whole device (an allocator that is out of memory, a module that is loaded), neither ends.
    Raises InvalidProgram if a neighbour sends a tensor that no action of this rank uses.
    """
    own = computes[rank]
    if num_ranks == 1:
        return list(own)
    uses = {receive: index for index, action in enumerate(own) if (receive := _receive(action, num_stages)) is not None}
    posts: dict[int, list[Action]] = defaultdict(list)  # index of a compute action -> receives before it, last first
    arriving = _arriving(rank, computes, num_ranks, num_stages)
    awaited = {channel.sender: _awaited(computes[channel.sender], places_of(own)) for channel in arriving}
    for channel in sorted(arriving, key=_order):
        place = len(own)
        for receive in reversed(arriving[channel]):
            if receive not in uses:
                raise InvalidProgram(f"{other_end(receive)} is sent, but nothing on rank {rank} uses it")
            place = min(place, max(uses[receive] - 1, awaited[channel.sender][_computed(other_end(receive))], 0))
            posts[place].append(receive)

    full: list[Action] = []
    for index, action in enumerate(own):
        full += reversed(posts.get(index, ()))
        full.append(action)
        if (send := _send(action, num_stages)) is not None:
            full.append(send)
    return full


def receipts(rank: int, actions: Sequence[Action], computes: Computes, num_ranks: int) -> dict[Action, list[Action]]:
    """Map each receive of a rank to the sends of this rank that are known to have arrived once it completes.

    actions: those of this rank, with communication; `computes` has its neighbours. A rank that continues after a
    computation has received its input, so whatever it sends later proves the arrival. A backend that cannot tell when a
    send is complete (gloo) then need not keep all tensors of a step until its end.
    """
    proofs: dict[int, list[Action]] = defaultdict(list)  # the receives from each neighbour, in the order of posting
    for action in actions:
        if action.kind in RECEIVES:
            proofs[channel_of(action, num_ranks).sender].append(action)
    places = {neighbour: places_of(computes[neighbour]) for neighbour in proofs}
    found: dict[Action, list[Action]] = defaultdict(list)
    looked_at: dict[Channel, int] = defaultdict(int)  # later sends of a channel are proved by later receives
    for send in actions:
        if send.kind not in SENDS:
            continue
        channel = channel_of(send, num_ranks)
        received, n = proofs[channel.receiver], looked_at[channel]
        if received:
            place = places[channel.receiver]
            used = place[_computed(other_end(send))]
            while n < len(received) and place[_computed(other_end(received[n]))] < used:
                n += 1
        looked_at[channel] = n
        if n < len(received):
            found[received[n]].append(send)
    return found


def places_of(actions: Sequence[Action]) -> dict[Action, int]:
    """Index of each forward, input gradient and weight gradient among a rank's compute actions."""
    return {result: index for index, action in enumerate(actions) for result in results(action)}


def needs_of(actions: Sequence[Action], places: Mapping[Action, int]) -> list[int]:
    """The number of actions that another rank must have done before each action of a rank, 0 if none. `places`: those
    of the other rank."""
    found = []
    for kind, stage, i in actions:
        if kind is Kind.FORWARD:
            found.append(places.get(Action(kind, stage - 1, i), -1) + 1)
        else:
            found.append(0 if kind is Kind.WEIGHT else places.get(Action(Kind.INPUT, stage + 1, i), -1) + 1)
    return found


def _awaited(actions: Sequence[Action], places: Mapping[Action, int]) -> dict[Action, int]:
    """The number of actions of this rank that must be done before each result of a neighbour. `places`: those of this
    rank."""
    found: dict[Action, int] = {}
    most = 0
    for action, needed in zip(actions, needs_of(actions, places)):
        most = max(most, needed)
        found |= dict.fromkeys(results(action), most)
    return found


def _computed(message: Action) -> Action:
    """The action that makes the tensor of a send, or uses the tensor of a receive."""
    kind, stage, microbatch = message
    return Action(_COMPUTED[kind], stage, microbatch)


def _arriving(rank: int, computes: Computes, num_ranks: int, num_stages: int) -> dict[Channel, list[Action]]:
    """The receives of each channel to a rank, in the order of its sends."""
    found: dict[Channel, list[Action]] = defaultdict(list)
    for neighbour in neighbours(rank, num_ranks, num_stages):
        for action in computes[neighbour]:
            send = _send(action, num_stages)
            if send is not None and rank_of((receive := other_end(send)).stage, num_ranks) == rank:
                found[channel_of(receive, num_ranks)].append(receive)
    return found


def _send(action: Action, num_stages: int) -> Action | None:
    """The send that follows a compute action, if the next stage is on another rank."""
    kind, stage, microbatch = action
    if kind is Kind.FORWARD:
        return Action(Kind.SEND_FORWARD, stage, microbatch) if stage < num_stages - 1 else None
    if kind is Kind.WEIGHT or stage == 0:
        return None
    return Action(Kind.SEND_BACKWARD, stage, microbatch)


def _receive(action: Action, num_stages: int) -> Action | None:
    """The receive that must complete before a compute action, if the tensor comes from another rank."""
    kind, stage, microbatch = action
    if kind is Kind.FORWARD:
        return Action(Kind.RECV_FORWARD, stage, microbatch) if stage > 0 else None
    if kind is Kind.WEIGHT or stage == num_stages - 1:
        return None
    return Action(Kind.RECV_BACKWARD, stage, microbatch)


def _order(channel: Channel) -> tuple[str, int, int]:
    return channel.kind.value, channel.sender, channel.receiver
