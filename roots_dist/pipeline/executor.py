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
from roots_dist.pipeline.stage import Stage
from roots_dist.tensor.collectives import Later

Payload = dict[str, Tensor]
PayloadSpec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Work = tuple[int, int]  # (stage, microbatch)


@dataclass(frozen=True)
class Channels:
    """One-way streets to neighbouring ranks: (sender, receiver) in pipeline ranks and direction -> group. First in,
    first out: passes.py has put both ends' actions in one order."""

    groups: Mapping[tuple[int, int, str], dist.ProcessGroup]

    @staticmethod
    def connect(edges: Sequence[tuple[int, int, str]], mesh: Mesh) -> Channels:
        """Make the groups of the edges that end at this rank. Collective over the pipeline: all pass the same edges."""
        mine = [e for e in edges if mesh.pp.rank in e[:2]]
        ranks = mesh.pp.ranks
        return Channels({e: mesh.channel(ranks[e[0]], ranks[e[1]], f"{e[2]} pp{e[0]} to pp{e[1]}") for e in mine})


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
    channels: Channels
    later: Later

    def run(self, actions: Sequence[Action], batches: Sequence[MicroBatch], scale: float) -> list[Term]:
        """Do the actions. Gradients of Σ weight · scale · sum over the terms are added into .grad.

        Returns the last stage's terms, detached, one per microbatch and part; an empty list on other ranks.
        """
        flight, terms = _Flight(), []
        for kind, stage, i in actions:
            work = (stage, i)
            if kind is Kind.FORWARD:
                terms += self._forward(flight, work, batches[i], scale)
            elif kind in (Kind.BACKWARD, Kind.INPUT):
                self._backward(flight, work, put_off=kind is Kind.INPUT)
            elif kind is Kind.WEIGHT:
                for do in flight.put_off.pop(work):
                    do()
            elif kind is Kind.SEND_FORWARD:
                self._send(flight, "forward", flight.outputs[work], stage, stage + 1)
            elif kind is Kind.SEND_BACKWARD:
                self._send(flight, "backward", flight.gradients.pop((stage - 1, i)), stage, stage - 1)
            elif kind is Kind.RECV_FORWARD:
                flight.arriving["forward", work] = self._receive("forward", stage - 1, stage)
            elif kind is Kind.RECV_BACKWARD:
                flight.arriving["backward", work] = self._receive("backward", stage + 1, stage)
        for message, _ in flight.sent:
            message.wait()
        return terms

    def _forward(self, flight: _Flight, work: Work, batch: MicroBatch, scale: float) -> list[Term]:
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
            if learn:
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

    def _edge(self, direction: str, sender: int, receiver: int) -> tuple[dist.ProcessGroup, int, int]:
        a, b = rank_of(sender, self.mesh.pp.size), rank_of(receiver, self.mesh.pp.size)
        return self.channels.groups[a, b, direction], self.mesh.pp.ranks[a], self.mesh.pp.ranks[b]

    def _send(self, flight: _Flight, direction: str, payload: Payload, sender: int, receiver: int) -> None:
        group, _, there = self._edge(direction, sender, receiver)
        for name in self.spec:
            tensor = payload[name].detach().contiguous()
            flight.sent.append((dist.isend(tensor, there, group=group), tensor))
        flight.sent = [(message, tensor) for message, tensor in flight.sent if not message.is_completed()]

    def _receive(self, direction: str, sender: int, receiver: int) -> tuple[Payload, list[dist.Work]]:
        group, there, _ = self._edge(direction, sender, receiver)
        payload = {n: torch.empty(shape, dtype=dtype, device=self.mesh.device) for n, (shape, dtype) in self.spec.items()}
        return payload, [dist.irecv(payload[name], there, group=group) for name in self.spec]


def _arrived(flight: _Flight, direction: str, work: Work) -> Payload:
    payload, messages = flight.arriving.pop((direction, work))
    for message in messages:
        message.wait()
    return payload
