"""Runs one rank's list of actions: the only place where a schedule becomes forwards, backwards and messages.

    program (schedules.py, passes.py) + stages + microbatches --run--> terms of the loss, gradients in .grad

Knows nothing of models or DeepSpeed: a stage maps a payload (named tensors, their shapes known for each microbatch) to
a payload, and any stage may find terms of the loss. Sends and receives are asynchronous; a computation waits for its
own input only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roots_dist.parallel.pipeline.stage import Stage
from roots_dist.parallel.tensor.collectives import DeferredWeightGrads
from roots_dist.schedule.actions import Action, Kind, rank_of
from roots_dist.schedule.communication import Channel, channel_of
from roots_dist.world.batch import MicroBatch, PieceOutput
from roots_dist.world.mesh import Mesh
from roots_dist.world.stopwatch import Stopwatch

Payload = dict[str, Tensor]
PayloadSpec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Scales = Mapping[str, float]
"""What each term's sum is multiplied by before it is differentiated."""
Work = tuple[int, int]  # (stage, microbatch)


def connect(channels: Sequence[Channel], mesh: Mesh) -> dict[Channel, dist.ProcessGroup | None]:
    """The group of each channel. Collective over the world: all ranks pass the same list, that of the whole pipeline.

    Channels that go the same way share a group: between any two ranks its messages then go in one direction only, and
    arrive in the order in which they were sent, on gloo and on NCCL. In one group for both directions, two neighbours
    that send to each other at the same time would wait for each other (NCCL runs a pair's messages one by one).
    """
    ways: dict[tuple[Kind, bool], dist.ProcessGroup | None] = {}
    for kind, up in dict.fromkeys((c.kind, c.sender < c.receiver) for c in channels):
        ways[kind, up] = mesh.another_pp(f"{kind.name.lower()} {'up' if up else 'down'} pp").group
    return {c: ways[c.kind, c.sender < c.receiver] for c in channels}


@dataclass
class _Flight:
    """What is on its way or waiting, by (stage, microbatch)."""

    receipts: Mapping[Action, Sequence[Action]]
    arriving: dict[Action, tuple[Payload, list[dist.Work]]] = field(default_factory=dict)
    inputs: dict[Work, Payload] = field(default_factory=dict)
    outputs: dict[Work, tuple[Payload, Tensor | None]] = field(default_factory=dict)
    """What backward begins from: what was handed on, and the stage's own part of the loss."""
    leaving: dict[Work, Payload] = field(default_factory=dict)
    gradients: dict[Work, Payload] = field(default_factory=dict)
    put_off: dict[Work, list[Callable[[], None]]] = field(default_factory=dict)
    sent: dict[Action, list[tuple[dist.Work, Tensor]]] = field(default_factory=dict)
    """Tensors must live until they have gone."""


@dataclass(frozen=True)
class Executor:
    """stages: this rank's, by number. spec(stage, microbatch): what comes into a stage. lowest(microbatch): the first
    stage that learns, below which no gradient is computed or sent. later and watch: shared with the stages' layers."""

    mesh: Mesh
    stages: Mapping[int, Stage]
    num_stages: int
    spec: Callable[[int, MicroBatch], PayloadSpec]
    lowest_trainable: Callable[[MicroBatch], int]
    channels: Mapping[Channel, dist.ProcessGroup | None]
    deferred: DeferredWeightGrads
    watch: Stopwatch

    def run(
        self,
        actions: Sequence[Action],
        receipts: Mapping[Action, Sequence[Action]],
        batches: Sequence[MicroBatch],
        scales: Scales,
    ) -> list[Any]:
        """Do the actions. receipts: which sends have arrived when a receive has (passes.receipts). Gradients of Σ scale
        · sum over the terms are added into .grad.

        Returns what this rank's stages found in each microbatch, one after the other (terms, detached); an empty list
        on ranks whose stages find nothing. Under no_grad only forwards are meant, and `scales` are of no account.
        """
        flight, found = _Flight(receipts), []
        lowest_trainable = self.lowest_trainable(batches[0]) if torch.is_grad_enabled() else self.num_stages
        for action in actions:
            kind, stage, i = action
            work = (stage, i)
            if kind is Kind.FORWARD:
                found += self._forward(flight, work, batches[i], scales, lowest_trainable)
            elif needless(action, lowest_trainable):
                continue
            elif kind in (Kind.BACKWARD, Kind.INPUT):
                self._backward(flight, work, lowest_trainable, put_off=kind is Kind.INPUT)
            elif kind is Kind.WEIGHT:
                for do in flight.put_off.pop(work):
                    do()
            elif kind is Kind.SEND_FORWARD:
                self._send(flight, action, flight.leaving.pop(work))
            elif kind is Kind.SEND_BACKWARD:
                self._send(flight, action, flight.gradients.pop((stage - 1, i)))
            elif kind is Kind.RECV_FORWARD:
                flight.arriving[action] = self._receive(action, self.spec(stage, batches[i]))
            elif kind is Kind.RECV_BACKWARD:
                flight.arriving[action] = self._receive(action, _learned(self.spec(stage + 1, batches[i])))
        self._wait(message for sent in flight.sent.values() for message, _ in sent)
        return found

    def _forward(
        self, flight: _Flight, work: Work, batch: MicroBatch, scales: Scales, lowest_trainable: int
    ) -> list[Any]:
        stage, i = work
        payload = flight.inputs.pop(work, None)
        if payload is None and stage > 0:
            payload = self._arrived(flight, Action(Kind.RECV_FORWARD, *work))
        if payload is not None and stage > lowest_trainable:
            for tensor in payload.values():
                tensor.requires_grad_(tensor.is_floating_point())
        out: PieceOutput = self.stages[stage](payload, batch)
        if stage >= lowest_trainable:
            flight.inputs[work] = payload or {}
            flight.outputs[work] = out.payload, sum(t.sum * scales[t.name] for t in out.found) if out.found else None
        if stage < self.num_stages - 1:
            detached = {name: t.detach() for name, t in out.payload.items()}
            if self._is_mine(stage + 1):
                flight.inputs[stage + 1, i] = detached
            else:
                flight.leaving[work] = detached
        return [t.detached() for t in out.found] if torch.is_grad_enabled() else list(out.found)

    def _backward(self, flight: _Flight, work: Work, lowest_trainable: int, put_off: bool) -> None:
        stage, i = work
        inputs, (output, loss) = flight.inputs.pop(work), flight.outputs.pop(work)
        roots: list[Tensor] = [loss] if loss is not None and loss.requires_grad else []
        gradients: list[Tensor | None] = [None for _ in roots]
        if stage < self.num_stages - 1:
            given = flight.gradients.pop(work, None) or self._arrived(flight, Action(Kind.RECV_BACKWARD, *work))
            named = [name for name, t in output.items() if t.requires_grad]
            roots, gradients = [*roots, *(output[n] for n in named)], [*gradients, *(given[n] for n in named)]
        self.deferred.enabled = put_off
        if roots:  # none where nothing that learns has a part in what this stage finds
            torch.autograd.backward(roots, gradients)
        self.deferred.enabled = False
        if put_off:
            flight.put_off[work] = self.deferred.drain()
        if stage > lowest_trainable:
            learned = {name: t for name, t in inputs.items() if t.is_floating_point()}
            flight.gradients[stage - 1, i] = {
                name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in learned.items()
            }

    def _arrived(self, flight: _Flight, receive: Action) -> Payload:
        payload, messages = flight.arriving.pop(receive)
        self._wait(messages)
        for send in flight.receipts.get(receive, ()):
            for message, _ in flight.sent.pop(send, ()):
                message.wait()  # gloo lets go of a tensor only then; it does not take time
        return payload

    def _wait(self, messages: Iterable[dist.Work]) -> None:
        self.watch.lap("compute")
        for message in messages:
            message.wait()
        self.watch.lap("pp_wait")

    def _is_mine(self, stage: int) -> bool:
        return rank_of(stage, self.mesh.pp.size) == self.mesh.pp.rank

    def _send(self, flight: _Flight, action: Action, payload: Payload) -> None:
        channel = channel_of(action, self.mesh.pp.size)
        target, group = self.mesh.pp.ranks[channel.receiver], self.channels[channel]
        tensors = [payload[name].contiguous() for name in sorted(payload)]
        for send in [a for a, sent in flight.sent.items() if all(message.is_completed() for message, _ in sent)]:
            del flight.sent[send]  # NCCL says so itself
        flight.sent[action] = [(_begun(dist.isend(tensor, target, group=group)), tensor) for tensor in tensors]

    def _receive(self, action: Action, spec: PayloadSpec) -> tuple[Payload, list[dist.Work]]:
        channel = channel_of(action, self.mesh.pp.size)
        source, group = self.mesh.pp.ranks[channel.sender], self.channels[channel]
        payload = {n: torch.empty(shape, dtype=dtype, device=self.mesh.device) for n, (shape, dtype) in spec.items()}
        return payload, [_begun(dist.irecv(payload[name], source, group=group)) for name in sorted(payload)]


def _begun(message: dist.Work | None) -> dist.Work:
    """torch returns None to a rank outside the group; the ends of a channel are in it."""
    assert message is not None, "this rank is not in the group of its channel"
    return message


def needless(action: Action, lowest_trainable: int) -> bool:
    """Part of a backward pass through stages of which nothing learns, nor of those below. Both ends leave a message
    out."""
    kind, stage, _ = action
    if kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD):
        return False
    return stage <= lowest_trainable if kind is Kind.SEND_BACKWARD else stage < lowest_trainable


def _learned(spec: PayloadSpec) -> PayloadSpec:
    """What has a gradient."""
    return {name: (shape, dtype) for name, (shape, dtype) in spec.items() if dtype.is_floating_point}
