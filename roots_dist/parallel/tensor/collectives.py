"""Talk between tensor ranks: the raw messages, and the conjugate pair that makes autograd right across ranks.

    enter a region in which each rank works on its own columns, heads or words …  … and leave it
    forward   the same input (SP: gather the sequence)                            sum (SP: sum and scatter the sequence)
    backward  sum (SP: sum and scatter)                                           the same gradient (SP: gather)

Megatron's f and g (Shoeybi et al. 2019, section 3), and their sequence-parallel twins (Korthikanti et al. 2022, 4.2.2).
B sequences, S positions, D channels; s = S/tp under sequence parallelism (SP). The only file of layers that sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from roots_dist.world.mesh import SINGLE, Axis
from roots_dist.world.stopwatch import Stopwatch


class Later:
    """Work on weight gradients that a backward pass puts off (zero-bubble schedules). Off: the work is done at once."""

    def __init__(self) -> None:
        self.on = False
        self._work: list[Callable[[], None]] = []

    def put(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def take(self) -> list[Callable[[], None]]:
        """What has been put off since the last call."""
        work, self._work = self._work, []
        return work


@dataclass(eq=False)
class Split:
    """How the work of a layer is split over tensor ranks: what every parallel layer is handed."""

    tp: Axis = SINGLE
    sequence: bool = False
    """Outside the regions each rank holds S/tp positions."""
    later: Later = field(default_factory=Later)
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Told what is computing, and what waiting for the other tensor ranks."""

    def positions(self, seq: int) -> range:
        """The positions that this rank holds outside the regions."""
        if not self.sequence:
            return range(seq)
        assert seq % self.tp.size == 0, (seq, self.tp.size)
        return self.held(seq // self.tp.size)

    def held(self, mine: int) -> range:
        """The positions that this rank holds outside the regions, given how many."""
        return range(self.tp.rank * mine, (self.tp.rank + 1) * mine) if self.sequence else range(mine)

    @contextmanager
    def uncut(self) -> Iterator[None]:
        """Inside, each rank holds all positions: a single new one cannot be cut (generation). Not for learning: the
        parameters' specs say whose gradients are partial."""
        before, self.sequence = self.sequence, False
        try:
            yield
        finally:
            self.sequence = before


class Pending:
    """A message under way. Call it to wait and get the result."""

    def __init__(
        self,
        result: Tensor,
        work: dist.Work | None,
        watch: Stopwatch | None = None,
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        self._result, self._work, self._watch, self._finish = result, work, watch, finish

    def __call__(self) -> Tensor:
        if self._work is not None:
            if self._watch:
                self._watch.lap("compute")
            self._work.wait()
            if self._watch:
                self._watch.lap("tp")
        return self._finish(self._result)


def start_sum(x: Tensor, split: Split) -> Pending:
    """Sum over tensor ranks, in place: x must belong to the caller and not be saved by autograd."""
    if split.tp.size == 1:
        return Pending(x, None)
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, group=split.tp.group, async_op=True), split.watch)


def start_gather(x: Tensor, split: Split) -> Pending:
    """[B, s, D] -> [B, S, D], positions in the order of the ranks."""
    tp = split.tp
    if tp.size == 1:
        return Pending(x, None)
    out = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
    work = dist.all_gather_into_tensor(out, x.contiguous(), group=tp.group, async_op=True)
    return Pending(out, work, split.watch, lambda o: o.unflatten(0, (tp.size, -1)).transpose(0, 1).flatten(1, 2))


def start_scatter_sum(x: Tensor, split: Split) -> Pending:
    """[B, S, D] -> [B, s, D]: the sum over tensor ranks, of which each keeps its own positions."""
    tp = split.tp
    if tp.size == 1:
        return Pending(x, None)
    parts = x.unflatten(1, (tp.size, -1)).transpose(0, 1).contiguous()  # [tp, B, s, D]
    out = x.new_empty(parts.shape[1:])
    work = dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=tp.group, async_op=True)
    return Pending(out, work, split.watch)


def max_(x: Tensor, tp: Axis) -> Tensor:
    """Maximum over tensor ranks, in place."""
    if tp.size > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=tp.group)
    return x


def gather_last(x: Tensor, tp: Axis) -> Tensor:
    """[..., v] -> [..., V]: for what is read, not learned from (logits of generated text)."""
    if tp.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    dist.all_gather(parts, x.contiguous(), group=tp.group)
    return torch.cat(parts, -1)


# The four halves. Layers that compute on both sides of a message (parallel/tensor/linear.py) call them to overlap the two.


def start_enter(x: Tensor, split: Split) -> Pending:
    """The region's input [B, S, D] from this rank's x."""
    return start_gather(x, split) if split.sequence else Pending(x, None)


def start_enter_backward(grad: Tensor, split: Split) -> Pending:
    """Each rank knows what its own columns say about the input; the truth is the sum. Consumes grad [B, S, D]."""
    return start_scatter_sum(grad, split) if split.sequence else start_sum(grad, split)


def start_leave(partial: Tensor, split: Split) -> Pending:
    """Each rank has the sum over its own rows; the output is the sum of all. Consumes partial [B, S, D]."""
    return start_scatter_sum(partial, split) if split.sequence else start_sum(partial, split)


def start_leave_backward(grad: Tensor, split: Split) -> Pending:
    """Every rank's partial sum gets the output's whole gradient [B, S, D]."""
    return start_gather(grad, split) if split.sequence else Pending(grad, None)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return start_enter(x, split)()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return start_enter_backward(grad.clone(), ctx.split)(), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return start_leave(partial.clone(), split)()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return start_leave_backward(grad, ctx.split)(), None


def enter(x: Tensor, split: Split) -> Tensor:
    """[B, s, D] under SP, else [B, S, D] -> [B, S, D]."""
    return x if split.tp.size == 1 else _Enter.apply(x, split)


def leave(partial: Tensor, split: Split) -> Tensor:
    """[B, S, D] -> [B, s, D] under SP, else [B, S, D]."""
    return partial if split.tp.size == 1 else _Leave.apply(partial, split)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return start_gather(x, split)()

    @staticmethod
    def backward(ctx, grad: Tensor):
        mine = ctx.split.positions(grad.shape[1])
        return grad[:, mine.start : mine.stop].contiguous(), None


def whole(x: Tensor, split: Split) -> Tensor:
    """[B, s, D] under SP -> [B, S, D], for what every tensor rank does alike (a head of few outputs): each already has
    the whole gradient, of which it keeps its positions. After `enter` it would be counted once per rank."""
    return _Whole.apply(x, split) if split.sequence and split.tp.size > 1 else x
