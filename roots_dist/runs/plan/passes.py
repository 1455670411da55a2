"""Count the passes of a stage, cut at the borders of its pieces: of equal blocks few are run, and one stands for many.

    kinds of a stage's pieces --fold--> Fold: which pieces are run, and how often each is counted
    stage under a Meter, which is its hooks --Segment of each piece--> Pass of all pieces

Of a long run of equal blocks the first, the second, the last but one and the last are run. The first and the last may
cost otherwise, because of their neighbours. That the other two cost the same is looked at each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from roots_dist.layout import AxisName
from roots_dist.parallel.pipeline.stage import Stage, StagePass
from roots_dist.parallel.tensor.deferred import DeferredWeightGrads
from roots_dist.parallel.zero.piece_hooks import UNDER_WAY
from roots_dist.runs.plan.cost_counter import CostCounter, Work
from roots_dist.schedule.actions import Kind
from roots_dist.world.batch import PieceOutput

RUN = 4
"""Periods of a run of equal blocks that are run."""
LONGEST_PERIOD = 8
"""Kinds of layers alternate (windows and full attention): the most blocks after which they begin again."""


class Message(NamedTuple):
    """A message between the ranks of one axis."""

    operation: str
    """all_reduce, all_gather, reduce_scatter or all_to_all."""
    bytes: int
    """Bytes of the full tensor: the result of each rank, or the input of a reduce_scatter or all_to_all."""
    axis: AxisName = "tp"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One action of a schedule: a forward or backward of one microbatch through one stage."""

    work: Work
    messages: tuple[Message, ...]
    peak_rise: int
    """Peak bytes during the pass, beyond those at its start."""
    first_peak_rise: int
    """The same in the step's first such pass, which also allocates the gradients of weights."""
    handed_on: tuple[tuple[int, int], ...] = ()
    """The same, moment by moment, in a pass that makes the gradients of each piece anew and hands them on (ZeRO 2 and
    3); and the bytes of those that data ranks have summed until then."""


class UnequalError(Exception):
    """Two blocks of one kind cost differently: all have to be run."""


@dataclass(frozen=True)
class Fold:
    """Pieces of a stage that stand for all of them, as few as possible. Pieces are named."""

    left_out: frozenset[str] = frozenset()
    """Pieces that are not run."""
    group_of: Mapping[str, str] = field(default_factory=dict)
    """Piece that stands for several -> the first of the period that it is repeated in."""
    times: Mapping[str, int] = field(default_factory=dict)
    """First piece of a period -> the periods that it is counted for."""
    twins: Mapping[str, str] = field(default_factory=dict)
    """Piece that stands for several -> one that must cost the same."""

    def count(self, piece: str) -> int:
        """The number of pieces that this one stands for."""
        return self.times[self.group_of[piece]] if piece in self.group_of else 1


def fold(names: Sequence[str], kinds: Sequence[Hashable | None]) -> Fold:
    """Find the runs of equal pieces; a kind of None equals no other."""
    left_out: set[str] = set()
    group_of, times, twins = {}, {}, {}
    start = 0
    while start < len(kinds):
        saved, period, periods = max(
            ((found - RUN) * size, size, found)
            for size in range(1, LONGEST_PERIOD + 1)
            for found in [_periods(kinds[start:], size)]
        )
        if saved <= 0:
            start += 1
            continue
        second, skipped = start + period, (periods - RUN) * period
        for here in range(second, second + period):
            group_of[names[here]] = names[second]
            twins[names[here]] = names[here + period + skipped]
        times[names[second]] = 1 + periods - RUN
        left_out |= {*names[second + period : second + period + skipped]}
        start += periods * period
    return Fold(frozenset(left_out), group_of, times, twins)


def _periods(kinds: Sequence[Hashable | None], period: int) -> int:
    """Number of times that the first `period` kinds follow each other at the beginning."""
    if None in kinds[:period]:
        return 0
    same = period
    while same < len(kinds) and kinds[same] == kinds[same - period]:
        same += 1
    return min(same, len(kinds)) // period


@dataclass(frozen=True)
class Segment:
    """Counts between two borders."""

    operations: list[tuple[float, float]]
    messages: list[Message]
    peak_rise: int
    """Bytes at most, beyond those at its start."""
    growth: int
    """Bytes that are alive at its end, beyond those at its start."""


class Meter:
    """Counts the passes of one stage, whose hooks it is meanwhile."""

    def __init__(
        self, counter: CostCounter, messages: list[Message], stage: Stage, deferred: DeferredWeightGrads, fold: Fold
    ):
        """messages: what the stage's groups add theirs to."""
        self._counter, self._messages, self._deferred, self._fold = counter, messages, deferred, fold
        self._names = dict(zip(stage.pieces, stage.names))
        self._segments: list[tuple[str | None, Segment]] = []
        self._piece: str | None = None
        self._start = 0
        self._later: list[tuple[str | None, int]] = []
        """Pieces in the order of backward, and how much work has been deferred once each is over."""
        self._found: dict[Kind, list[Pass]] = {}
        self._cut: dict[Kind, list[tuple[str | None, Segment]]] = {}
        """Segments of the last pass of each kind, those of pieces that are not run included."""
        self._unseen = 0

    @property
    def live(self) -> int:
        """Bytes that are alive, those of pieces that are not run included."""
        return self._counter.live + self._unseen

    @property
    def passes(self) -> dict[Kind, Pass]:
        """The last one of each kind."""
        return {kind: found[-1] for kind, found in self._found.items()}

    @contextmanager
    def of(self, kind: Kind) -> Iterator[None]:
        """Count what happens inside as one pass. Backward begins in the last piece."""
        self._segments = []
        self._open(None if kind in (Kind.FORWARD, Kind.WEIGHT) else [*self._names.values()][-1])
        yield
        self._close()
        self._cut[kind] = []
        self._found.setdefault(kind, []).append(self._pass(kind))

    def run_deferred(self, work: Sequence[Callable[[], None]]) -> None:
        """Do what backward has deferred, piece by piece, inside of a pass."""
        done = 0
        for piece, until in [*self._later, (None, len(work))]:
            self._border(piece)
            self._deferred.run(work[done:until])
            done = until
        self._later = []

    # as the stage's hooks

    def enter(self, piece: nn.Module, payload: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut the forward pass here, and the backward pass when it has come through the piece."""
        name = self._names[piece]
        self._border(name)
        hidden = payload.get("hidden")
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: self._leave_backward(name))
        return payload

    def leave(self, piece: nn.Module, output: Any) -> Any:
        """Give the output as many terms of the loss as the pieces have that this one stands for."""
        more = self._fold.count(self._names[piece]) - 1
        if not more or not isinstance(output, PieceOutput):
            return output
        again = tuple(replace(term, sum=term.sum.detach()) for term in output.results)
        return PieceOutput(output.results + again * more, output.payload)

    def before(self, started: StagePass) -> None:
        """Do nothing."""

    def after(self, ended: StagePass) -> None:
        """Do nothing."""

    def _leave_backward(self, name: str) -> None:
        names = [*self._names.values()]
        before = names.index(name) - 1
        self._later.append((name, len(self._deferred)))
        self._border(names[before] if before >= 0 else None)

    def _border(self, following: str | None) -> None:
        self._close()
        self._open(following)

    def _open(self, piece: str | None) -> None:
        self._counter.restart_peak()
        self._counter.take()
        del self._messages[:]
        self._piece, self._start = piece, self._counter.live

    def _close(self) -> None:
        counter, start = self._counter, self._start
        found = Segment(counter.take().operations, self._messages[:], counter.peak - start, counter.live - start)
        self._segments.append((self._piece, found))

    def handed_on(self, kind: Kind, own: Mapping[str, int], shared: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
        """Bytes of a backward pass beyond those at its start, if it hands the gradients of pieces on: those of one
        piece, which are copied into a message, and of those before it whose messages are under way. own: bytes of each
        piece's gradients; shared: of those that a later piece adds to as well, which are there all the time, and once
        more for the sum of the two."""
        held, summed, moments = sum(shared.values()), 0, []
        under_way: list[int] = []
        for piece, segment in self._cut[kind]:
            also = shared.get(piece or "", 0)
            made = own.get(piece or "", 0) + also
            moments.append((held + segment.peak_rise + made + sum(under_way), summed))
            held += segment.growth
            if made:
                summed += sum(under_way[:-UNDER_WAY])
                del under_way[:-UNDER_WAY]
                moments.append((held + made - also + made + sum(under_way), summed))
                held -= also
                under_way.append(made)
        return tuple(moments)

    def _pass(self, kind: Kind) -> Pass:
        """The pass that the segments are, with those of the pieces that are not run."""
        self._compare()
        work, messages, held, most = Work(), [], 0, 0
        for group, found in groupby(self._segments, key=lambda found: self._fold.group_of.get(found[0] or "")):
            same = [*found]
            one = [segment for _, segment in same]
            times = self._fold.times[group] if group is not None else 1
            self._unseen += (times - 1) * sum(segment.growth for segment in one)
            self._cut[kind] += [*same] * times
            for segment in one * times:
                work.operations += segment.operations
                messages += segment.messages
                most = max(most, held + segment.peak_rise)
                held += segment.growth
        earlier = self._found.get(kind)
        first = earlier[0].peak_rise if earlier else most
        return Pass(work=work, messages=tuple(messages), peak_rise=most, first_peak_rise=first)

    def _compare(self) -> None:
        """Raise UnequalError if a piece that stands for several does not cost what its twin costs."""
        of: dict[str | None, list[Segment]] = {}
        for piece, segment in self._segments:
            of.setdefault(piece, []).append(segment)
        if any(of.get(piece) != of.get(twin) for piece, twin in self._fold.twins.items()):
            raise UnequalError
