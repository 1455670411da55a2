"""Runs one rank's list of actions: the only place where a schedule becomes forwards, backwards and messages.

    program (schedules.py, passes.py) + stages + microbatches --run--> terms of the loss, gradients in .grad

Knows nothing of models or DeepSpeed: a stage maps a payload (named tensors of static shape) to a payload, the last one
to terms. Sends and receives are asynchronous; a computation waits for its own input only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roots_dist.mesh import Mesh
from roots_dist.objectives.base import MicroBatch, Term
from roots_dist.pipeline.actions import Action, Kind, rank_of
from roots_dist.pipeline.passes import Channel, channel_of
from roots_dist.pipeline.stage import Stage
from roots_dist.tensor.collectives import Later

Payload = dict[str, Tensor]
PayloadSpec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Work = tuple[int, int]  # (stage, microbatch)


def connect(channels: Sequence[Channel], mesh: Mesh) -> dict[Channel, dist.ProcessGroup]:
    """The group of each channel. Collective over the world: all ranks pass the same list, that of the whole pipeline.

    Channels that go the same way share a group: between any two ranks its messages then go in one direction only, and
    arrive in the order in which they were sent, on gloo and on NCCL. In one group for both directions, two neighbours
    that send to each other at the same time would wait for each other (NCCL runs a pair's messages one by one).
    """
    ways = {(c.kind, c.sender < c.receiver): None for c in channels}
    for kind, up in ways:
        ways[kind, up] = mesh.another_pp(f"{kind.name.lower()} {'up' if up else 'down'} pp").group
    return {c: ways[c.kind, c.sender < c.receiver] for c in channels}


@dataclass
class _Flight:
    """What is on its way or waiting, by (stage, microbatch)."""

    arriving: dict[tuple[str, Work], tuple[Payload, list[dist.Work]]] = field(default_factory=dict)
    inputs: dict[Work, Payload] = field(default_factory=dict)
    outputs: dict[Work, Any] = field(default_factory=dict)
    gradients: dict[Work, Payload] = field(default_factory=dict)
    put_off: dict[Work, list] = field(default_factory=dict)
    sent: list[tuple[dist.Work, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Executor:
    """stages: this rank's, by number. spec: what crosses a stage boundary. later: shared with the stages' layers."""

    mesh: Mesh
    stages: Mapping[int, Stage]
    num_stages: int
    spec: PayloadSpec
    channels: Mapping[Channel, dist.ProcessGroup]
    later: Later

    def run(self, actions: Sequence[Action], batches: Sequence[MicroBatch], scale: float) -> list:
        """Do the actions. Gradients of Σ weight · scale · sum over the terms are added into .grad.

        Returns what the last stage made of each microbatch, one after the other (terms, detached); an empty list on
        other ranks. Under no_grad only forwards are meant, and `scale` is of no account.
        """
        flight, found = _Flight(), []
        for action in actions:
            kind, stage, i = action
            work = (stage, i)
            if kind is Kind.FORWARD:
                found += self._forward(flight, work, batches[i], scale)
            elif kind in (Kind.BACKWARD, Kind.INPUT):
                self._backward(flight, work, put_off=kind is Kind.INPUT)
            elif kind is Kind.WEIGHT:
                for do in flight.put_off.pop(work):
                    do()
            elif kind is Kind.SEND_FORWARD:
                keep = torch.is_grad_enabled()  # for backward; without one the output may go as soon as it is sent
                self._send(flight, action, flight.outputs[work] if keep else flight.outputs.pop(work))
            elif kind is Kind.SEND_BACKWARD:
                self._send(flight, action, flight.gradients.pop((stage - 1, i)))
            elif kind is Kind.RECV_FORWARD:
                flight.arriving["forward", work] = self._receive(action)
            elif kind is Kind.RECV_BACKWARD:
                flight.arriving["backward", work] = self._receive(action)
        for message, _ in flight.sent:
            message.wait()
        return found

    def _forward(self, flight: _Flight, work: Work, batch: MicroBatch, scale: float) -> list:
        stage, i = work
        payload = flight.inputs.pop(work, None)
        if payload is None and stage > 0:
            payload = _arrived(flight, "forward", work)
        if payload is not None and torch.is_grad_enabled():
            for tensor in payload.values():
                tensor.requires_grad_(tensor.is_floating_point())
        out = self.stages[stage](payload, batch)
        learn = torch.is_grad_enabled()
        if learn:
            flight.inputs[work] = payload or {}
        if stage == self.num_stages - 1:
            if not learn:
                return list(out)
            flight.outputs[work] = sum(t.sum * (t.weight * scale) for t in out)
            return [Term(t.sum.detach(), t.count, t.weight) for t in out]
        if self._is_mine(stage + 1):
            flight.inputs[stage + 1, i] = {name: t.detach() for name, t in out.items()}
        if learn or not self._is_mine(stage + 1):
            flight.outputs[work] = out
        return []

    def _backward(self, flight: _Flight, work: Work, put_off: bool) -> None:
        stage, i = work
        inputs, output = flight.inputs.pop(work), flight.outputs.pop(work)
        self.later.on = put_off
        if stage == self.num_stages - 1:
            output.backward()
        else:
            gradients = flight.gradients.pop(work, None) or _arrived(flight, "backward", work)
            torch.autograd.backward(list(output.values()), [gradients[name] for name in output])
        self.later.on = False
        if put_off:
            flight.put_off[work] = self.later.take()
        if stage > 0:
            flight.gradients[stage - 1, i] = {
                name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in inputs.items()
            }

    def _is_mine(self, stage: int) -> bool:
        return rank_of(stage, self.mesh.pp.size) == self.mesh.pp.rank

    def _send(self, flight: _Flight, action: Action, payload: Payload) -> None:
        channel = channel_of(action, self.mesh.pp.size)
        for name in self.spec:
            tensor = payload[name].detach().contiguous()
            message = dist.isend(tensor, self.mesh.pp.ranks[channel.receiver], group=self.channels[channel])
            flight.sent.append((message, tensor))  # the tensor must live until it has gone
        flight.sent = [(message, tensor) for message, tensor in flight.sent if not message.is_completed()]

    def _receive(self, action: Action) -> tuple[Payload, list[dist.Work]]:
        channel = channel_of(action, self.mesh.pp.size)
        source, group = self.mesh.pp.ranks[channel.sender], self.channels[channel]
        payload = {n: torch.empty(shape, dtype=dtype, device=self.mesh.device) for n, (shape, dtype) in self.spec.items()}
        return payload, [dist.irecv(payload[name], source, group=group) for name in self.spec]


def _arrived(flight: _Flight, direction: str, work: Work) -> Payload:
    payload, messages = flight.arriving.pop((direction, work))
    for message in messages:
        message.wait()
    return payload
