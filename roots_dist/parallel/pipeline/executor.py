"""Runs one rank's list of actions: the only place where a schedule becomes forward and backward passes and messages.

    program (schedule/) + stages + microbatches --run--> terms of the loss, gradients in .grad

Knows nothing of models or DeepSpeed: a stage maps a payload (named tensors whose shapes are known for each microbatch)
to a payload, and any stage may compute terms of the loss. Sends and receives are asynchronous; a computation waits only
for its own input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge

from roots_dist.parallel.pipeline.parts import empty_part, gathered, part_of
from roots_dist.parallel.pipeline.stage import Stage, StagePass
from roots_dist.parallel.tensor.deferred import DeferredWeightGrads
from roots_dist.schedule.actions import Action, Kind, rank_of
from roots_dist.schedule.communication import COMPUTE, Direction, channel_of
from roots_dist.world.batch import MicroBatch, PieceOutput
from roots_dist.world.exact import Exact
from roots_dist.world.mesh import SINGLE, Axis, Mesh
from roots_dist.world.stopwatch import Stopwatch

Payload = dict[str, Tensor]
PayloadSpec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Scales = Mapping[str, float | Tensor]
"""Factor on each term's sum before it is differentiated; a scalar tensor has the dtype of the sum."""
Work = tuple[int, int]  # (stage, microbatch)


def connect(directions: Sequence[Direction], mesh: Mesh) -> dict[Direction, dist.ProcessGroup | None]:
    """Create a group for each direction. Collective over the world: all ranks pass the directions of the whole pipeline
    (communication.directions).

    Channels in the same direction share a group, so that between any two ranks the group's messages go one way and
    arrive in the order of their sends, on gloo and on NCCL. With one group for both directions, two neighbours that
    send to each other at the same time would deadlock (NCCL runs the messages of a pair one by one).
    """
    return {d: mesh.new_pp_axis(group_title(d)).group for d in directions}


def group_title(direction: Direction) -> str:
    """Name of the group of the messages in a direction, as `send_forward up pp`."""
    return f"{direction.kind.name.lower()} {'up' if direction.up else 'down'} pp"


def title(action: Action) -> str:
    """An action in words, as `recv forward of stage 1, microbatch 3`."""
    kind, stage, microbatch = action
    return f"{kind.name.lower().replace('_', ' ')} of stage {stage}, microbatch {microbatch}"


@dataclass
class _InFlight:
    """Tensors that are being sent or received or wait to be used, by (stage, microbatch)."""

    receipts: Mapping[Action, Sequence[Action]]
    arriving: dict[Action, tuple[Payload, PayloadSpec, list[dist.Work]]] = field(default_factory=dict)
    """Parts of payloads, and what the payloads are."""
    inputs: dict[Work, Payload] = field(default_factory=dict)
    outputs: dict[Work, tuple[dict[str, GradientEdge], Tensor | None]] = field(default_factory=dict)
    """Roots of the backward pass: where the gradients of the output payload go in, and the stage's own part of the
    loss. The payload itself may be gone once it has been sent."""
    outgoing: dict[Work, Payload] = field(default_factory=dict)
    gradients: dict[Work, Payload] = field(default_factory=dict)
    deferred_grads: dict[Work, list[Callable[[], None]]] = field(default_factory=dict)
    sent: dict[Action, list[tuple[dist.Work, Tensor]]] = field(default_factory=dict)
    """Tensors must stay alive until they have been sent."""


@dataclass(frozen=True)
class Executor:
    """Executes the actions of one pipeline rank.

    stages: this rank's stages, by number. spec(stage, microbatch): the payload that a stage receives.
    lowest_trainable(microbatch): the first stage with trainable parameters; below it no gradient is computed or sent.
    `deferred` and `watch` are shared with the stages' layers.
    """

    mesh: Mesh
    stages: Mapping[int, Stage]
    num_stages: int
    spec: Callable[[int, MicroBatch], PayloadSpec]
    lowest_trainable: Callable[[MicroBatch], int]
    groups: Mapping[Direction, dist.ProcessGroup | None]
    """Groups of the messages, from connect."""
    deferred: DeferredWeightGrads
    watch: Stopwatch
    same: Axis = SINGLE
    """Tensor ranks whose payloads are the same: each sends a part of them. Size 1 where each has positions of its own.
    """
    exact: Exact | None = None
    """Keeps gradients apart in an exact run: it is told which microbatch a pass belongs to."""

    def run(
        self,
        actions: Sequence[Action],
        receipts: Mapping[Action, Sequence[Action]],
        batches: Sequence[MicroBatch],
        scales: Scales,
    ) -> list[Any]:
        """Execute the actions and add the gradients of Σ scale · sum over the terms to .grad.

        receipts: the sends that have certainly arrived once a receive completes (communication.receipts). Returns the
        results of this rank's stages, microbatch by microbatch (terms, detached); an empty list on ranks whose stages
        compute none. Under no_grad only forward actions are allowed and `scales` is ignored.
        """
        flight, results = _InFlight(receipts), []
        lowest_trainable = self.lowest_trainable(batches[0]) if torch.is_grad_enabled() else self.num_stages
        actions = [a for a in actions if a.kind is Kind.FORWARD or not is_skipped(a, lowest_trainable)]
        passes = passes_of(actions, self.deferred) if any(s.hooks for s in self.stages.values()) else {}
        for action in actions:
            kind, stage, i = action
            work = (stage, i)
            self.mesh.progress.action = title(action)
            hooks = self.stages[stage].hooks if action in passes else None
            if hooks is not None:
                hooks.before(passes[action])
            if self.exact is not None and kind in (Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT):
                self.exact.select(self.stages[stage].parameters(), i)
            if kind is Kind.FORWARD:
                results += self._forward(flight, work, batches[i], scales, lowest_trainable)
            elif kind in (Kind.BACKWARD, Kind.INPUT):
                self._backward(flight, work, lowest_trainable, defer_weights=kind is Kind.INPUT)
            elif kind is Kind.WEIGHT:
                self.deferred.run(flight.deferred_grads.pop(work))
            elif kind is Kind.SEND_FORWARD:
                self._send(flight, action, flight.outgoing.pop(work))
            elif kind is Kind.SEND_BACKWARD:
                self._send(flight, action, flight.gradients.pop((stage - 1, i)))
            elif kind is Kind.RECV_FORWARD:
                flight.arriving[action] = self._receive(action, self.spec(stage, batches[i]))
            elif kind is Kind.RECV_BACKWARD:
                flight.arriving[action] = self._receive(action, _floating_point(self.spec(stage + 1, batches[i])))
            if self.exact is not None and kind in (Kind.BACKWARD, Kind.WEIGHT):
                self.exact.complete(self.stages[stage].parameters(), i)
            if hooks is not None:
                hooks.after(passes[action])
        for action, sent in flight.sent.items():
            self._wait(action, (message for message, _ in sent))
        self.mesh.progress.action = ""
        return results

    def _forward(
        self, flight: _InFlight, work: Work, batch: MicroBatch, scales: Scales, lowest_trainable: int
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
            flight.outputs[work] = (
                {name: get_gradient_edge(t) for name, t in out.payload.items() if t.requires_grad},
                sum(t.sum * scales[t.name] for t in out.results) if out.results else None,
            )
        if stage < self.num_stages - 1:
            detached = {name: t.detach() for name, t in out.payload.items()}
            if self._is_mine(stage + 1):
                flight.inputs[stage + 1, i] = detached
            else:
                flight.outgoing[work] = detached
        return [t.detached() for t in out.results] if torch.is_grad_enabled() else list(out.results)

    def _backward(self, flight: _InFlight, work: Work, lowest_trainable: int, defer_weights: bool) -> None:
        stage, i = work
        inputs, (output, loss) = flight.inputs.pop(work), flight.outputs.pop(work)
        roots = [get_gradient_edge(loss)] if loss is not None and loss.requires_grad else []
        gradients = [torch.ones_like(loss)] if loss is not None and roots else []
        if stage < self.num_stages - 1:
            received = flight.gradients.pop(work, None) or self._arrived(flight, Action(Kind.RECV_BACKWARD, *work))
            roots, gradients = [*roots, *output.values()], [*gradients, *(received[name] for name in output)]
        self.deferred.enabled = defer_weights
        if roots:  # empty if no trainable parameter contributes to this stage's results
            run_backward(roots, gradients)
        self.deferred.enabled = False
        if defer_weights:
            flight.deferred_grads[work] = self.deferred.drain()
        if stage > lowest_trainable:
            differentiable = {name: t for name, t in inputs.items() if t.is_floating_point()}
            flight.gradients[stage - 1, i] = {
                name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in differentiable.items()
            }

    def _arrived(self, flight: _InFlight, receive: Action) -> Payload:
        parts, spec, messages = flight.arriving.pop(receive)
        self._wait(receive, messages)
        for send in flight.receipts.get(receive, ()):
            for message, _ in flight.sent.pop(send, ()):
                message.wait()  # gloo releases the tensor only then; the wait itself takes no time
        return gathered(parts, {name: shape for name, (shape, _) in spec.items()}, self.same)

    def _wait(self, action: Action, messages: Iterable[dist.Work]) -> None:
        channel = channel_of(action, self.mesh.pp.size)
        other = channel.sender if self.mesh.pp.rank == channel.receiver else channel.receiver
        self.watch.lap("compute")
        with self.mesh.progress.waiting(title(action), group_title(channel.direction), self.mesh.pp.ranks[other]):
            for message in messages:
                message.wait()
        self.watch.lap("pp_wait")

    def _is_mine(self, stage: int) -> bool:
        return rank_of(stage, self.mesh.pp.size) == self.mesh.pp.rank

    def _send(self, flight: _InFlight, action: Action, payload: Payload) -> None:
        channel = channel_of(action, self.mesh.pp.size)
        target, group = self.mesh.pp.ranks[channel.receiver], self.groups[channel.direction]
        tensors = [part_of(payload[name], self.same) for name in sorted(payload)]
        for send in [a for a, sent in flight.sent.items() if all(message.is_completed() for message, _ in sent)]:
            del flight.sent[send]  # NCCL reports completion itself
        flight.sent[action] = [(_begun(dist.isend(tensor, target, group=group)), tensor) for tensor in tensors]

    def _receive(self, action: Action, spec: PayloadSpec) -> tuple[Payload, PayloadSpec, list[dist.Work]]:
        channel = channel_of(action, self.mesh.pp.size)
        source, group = self.mesh.pp.ranks[channel.sender], self.groups[channel.direction]
        parts = {name: empty_part(*of, self.mesh.device, self.same) for name, of in spec.items()}
        return parts, spec, [_begun(dist.irecv(parts[name], source, group=group)) for name in sorted(parts)]


def _begun(message: dist.Work | None) -> dist.Work:
    """The work of a message. torch returns None to a rank outside the group, but both ends of a channel are in it."""
    assert message is not None, "this rank is not in the group of its channel"
    return message


def run_backward(roots: Sequence[Tensor | GradientEdge], gradients: Sequence[Tensor]) -> None:
    """Do what torch.autograd.backward does, which compares the shapes first and imports sympy for it: a third of a
    second of each rank's first step. The engine compares them too."""
    _engine_run_backward(tuple(roots), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


def passes_of(actions: Sequence[Action], deferred: DeferredWeightGrads) -> dict[Action, StagePass]:
    """The passes among a rank's actions, with what a stage's hooks are told of them."""
    passes = [action for action in actions if action.kind in COMPUTE]
    last = {action.stage: action for action in passes if action.kind in (Kind.BACKWARD, Kind.WEIGHT)}
    found: dict[Action, StagePass] = {}
    following: Action | None = None
    for action in reversed(passes):
        found[action] = StagePass(action, last.get(action.stage) == action, following, deferred)
        if action.kind is not Kind.WEIGHT:  # whose products have no weight as a factor
            following = action
    return found


def is_skipped(action: Action, lowest_trainable: int) -> bool:
    """True if an action belongs to a backward pass through stages without trainable parameters at or below them. Both
    ends of a message skip it."""
    kind, stage, _ = action
    if kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD):
        return False
    return stage <= lowest_trainable if kind is Kind.SEND_BACKWARD else stage < lowest_trainable


def _floating_point(spec: PayloadSpec) -> PayloadSpec:
    """The tensors that have a gradient."""
    return {name: (shape, dtype) for name, (shape, dtype) in spec.items() if dtype.is_floating_point}
