"""Hooks that gather and reduce units: piece by piece, beside the passes, so that data ranks send while they compute.

                 forward of piece k                         backward of piece k
    before it    wait for its weights, start the next's     wait for its weights, start those of piece k - 1
    after it                                                start to sum its gradients

The marks are identities in autograd's graph, whose backward says that a piece's backward begins, or has ended: autograd
runs what was computed last first, so that all of a piece's gradients are there before that of its input is handed on.
The last backward of a step starts the sums under ZeRO 0 and 1, which keep whole gradients until then; every backward
does under ZeRO 2 and 3. Under ZeRO 3 at most the weights of two pieces are whole at a time. All data ranks have the
same passes, and so the same messages in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from roots_dist.parallel.pipeline.stage import Stage, StagePass
from roots_dist.parallel.zero.unit import Unit
from roots_dist.schedule.actions import Action, Kind
from roots_dist.world.batch import PieceOutput, Term

UNDER_WAY = 1
"""Sums that may be under way while the next one starts, under ZeRO 2 and 3, where each holds a piece's whole gradients,
and where a second sum follows, over the ranks that hold the same shards."""


class UnitHooks:
    """The hooks of a rank's stages (parallel/pipeline/stage.py)."""

    def __init__(self, units: Sequence[Unit], stages: Sequence[Stage], zero_stage: int, *, at_end: bool = False):
        """at_end: no sum starts before the last pass of a step, whatever the stage (exact runs)."""
        self.units, self.zero_stage, self.at_end = units, zero_stage, at_end
        self._of: dict[nn.Module, list[Unit]] = {piece: [] for stage in stages for piece in stage.pieces}
        for unit in units:
            for piece in unit.pieces:
                self._of[piece].append(unit)
        self._stages: dict[int, Stage] = {}
        self._now: StagePass | None = None
        self._ended: set[nn.Module] = set()
        """Pieces whose gradients this pass has completed."""
        self._started: list[Unit] = []
        """Units with sums under way, oldest first."""

    # ── called by the executor and its stages ───────────────────────────────────────────────────────────────────────

    def bind(self, number: int, stage: Stage) -> None:
        """Be the hooks of a stage."""
        self._stages[number], stage.hooks = stage, self

    def before(self, started: StagePass) -> None:
        self._now = started
        self._ended.clear()

    def enter(self, piece: nn.Module, payload: dict[str, Tensor]) -> dict[str, Tensor]:
        self._use(piece, self._after(piece, forward=True))
        if not torch.is_grad_enabled():
            return payload
        return _marked_payload(payload, partial(self._complete, piece))

    def leave(self, piece: nn.Module, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        then = partial(self._begin_backward, piece)
        if not isinstance(output, PieceOutput):
            return _marked_payload(output, then)
        names = [name for name, tensor in output.payload.items() if tensor.requires_grad]
        terms = [i for i, term in enumerate(output.results) if isinstance(term, Term) and term.sum.requires_grad]
        marked = _marked([*(output.payload[name] for name in names), *(output.results[i].sum for i in terms)], then)
        results = list(output.results)
        for i, total in zip(terms, marked[len(names) :]):
            results[i] = replace(results[i], sum=total)
        return PieceOutput(tuple(results), output.payload | dict(zip(names, marked)))

    def after(self, ended: StagePass) -> None:
        if ended.action.kind in (Kind.BACKWARD, Kind.WEIGHT):  # what has no input that needs a gradient has no mark
            for piece in reversed(self._stages[ended.action.stage].pieces):
                if piece not in self._ended:
                    self._complete(piece)
        if ended.following is None:
            self.free()

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_backward(self, piece: nn.Module) -> None:
        self._use(piece, self._after(piece, forward=False))

    def _after(self, piece: nn.Module, *, forward: bool) -> nn.Module | None:
        """The piece whose weights are needed next."""
        if self._now is None:
            return None
        pieces = list(self._stages[self._now.action.stage].pieces)
        number = pieces.index(piece) + (1 if forward else -1)
        if 0 <= number < len(pieces):
            return pieces[number]
        following = self._now.following
        return None if following is None else self._first_of(following)

    def _first_of(self, action: Action) -> nn.Module:
        return self._stages[action.stage].pieces[0 if action.kind is Kind.FORWARD else -1]

    def _use(self, piece: nn.Module, following: nn.Module | None) -> None:
        """Have the weights of a piece, and start to gather those of the next one; all others are given back."""
        mine = self._of[piece]
        then = [] if following is None else self._of[following]
        if self.zero_stage >= 3:
            for unit in self.units:
                if unit not in mine and unit not in then and unit.weights is not None:
                    unit.weights.free()
            self._gather([*mine, *then])
        for unit in mine:
            if unit.weights is not None:
                unit.weights.wait()

    def _gather(self, units: Sequence[Unit]) -> None:
        for unit in units:
            if unit.weights is not None and not unit.weights.is_held:
                unit.weights.start_gather()

    def free(self) -> None:
        """Give back the memory of all gathered weights, under ZeRO 3."""
        for unit in self.units:
            if unit.weights is not None:
                unit.weights.free()

    # ── gradients ───────────────────────────────────────────────────────────────────────────────────────────────────

    def start_step(self) -> None:
        for unit in self.units:
            unit.unfinished = set(unit.pieces)
            unit.has_news = True

    def _complete(self, piece: nn.Module) -> None:
        """Note that a pass has completed the gradients of a piece, and start the sums of units that wait for no other.
        If gradients of weights are put off, this is put off behind them."""
        assert self._now is not None
        if self._now.action.kind is Kind.INPUT:
            self._now.deferred.defer(partial(self._complete, piece))
            return
        self._ended.add(piece)
        for unit in self._of[piece]:
            unit.has_news = True
            if self._now.is_last:
                unit.unfinished.discard(piece)
            if not self.at_end and (not unit.unfinished if self.zero_stage < 2 else piece is unit.pieces[0]):
                self._start(unit)

    def _start(self, unit: Unit) -> None:
        if not unit.is_trained or unit.gradients.axis.size == 1 or not unit.has_news:
            return
        if self.zero_stage >= 2 or unit.gradients.replicas.size > 1:
            while len(self._started) > UNDER_WAY:
                older = self._started.pop(0)
                older.gradients.finish()
                if not older.unfinished and not older.has_news:
                    older.gradients.start_over_replicas()
        unit.gradients.start()
        unit.has_news = False
        self._started.append(unit)

    def finish_step(self) -> None:
        """Start the sums that no pass has started, and wait for all."""
        for unit in self.units:
            self._start(unit)
        self._started.clear()
        for unit in self.units:
            unit.gradients.finish()
            unit.gradients.start_over_replicas()
        for unit in self.units:
            unit.gradients.finish_over_replicas()


class _Mark(torch.autograd.Function):
    """Identity of some tensors. Calls `then` in backward, when the gradients of all of them are there."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.then()
        return None, *grads


def _marked(tensors: Sequence[Tensor], then: Callable[[], None]) -> tuple[Tensor, ...]:
    if not tensors:
        return ()
    marked: tuple[Tensor, ...] = _Mark.apply(then, *tensors)  # type: ignore[no-untyped-call] # torch types no apply
    return marked


def _marked_payload(payload: dict[str, Tensor], then: Callable[[], None]) -> dict[str, Tensor]:
    names = [name for name, tensor in payload.items() if tensor.requires_grad]
    return payload | dict(zip(names, _marked([payload[name] for name in names], then)))


def stages_of(module: nn.Module) -> Iterator[Stage]:
    """A rank's stages, in the order of their numbers."""
    return (stage for stage in module.children() if isinstance(stage, Stage))
