"""Attention over the positions of several context ranks, in one of two ways (parallel.cp_kind).

    gather  k, v [2, B, g, L, K] --all-gather, put in order--> [2, B, g, S, K], for this rank's queries
            its gradient         <--reduce-scatter, sum------- gradient, of this rank's queries
            where they are large, g/n heads at a time: attention runs on some heads while the next ones travel
    heads   q, k, v [B, h, L, K] --all-to-all----------------> [B, h/cp, S, K]
            output               <--all-to-all---------------- [B, h/cp, S, K], and the same for gradients

When keys and values are gathered, only this rank's are kept between forward and backward: what backward needs of the
others is gathered again. A text is cut into C shards: one for each rank, or in an exact run several. B sequences, S
positions, L = S/cp positions of this rank (world/positions.py), h heads of any kind, g key/value heads in n groups, K
head width. Head exchange is Ulysses (Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from roots_dist.errors import present
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.tree_sum import Started, start_tree_reduce_scatter

LEAST_BYTES = 16 << 20
"""The least that the keys and values of a group of heads have when they are gathered: below that a message is short
against its start, and attention on so few heads does not fill a GPU."""


def num_groups(heads: int, nbytes: int) -> int:
    """Groups in which key/value heads are gathered, `nbytes` of keys and values in all: as many as leave LEAST_BYTES to
    each."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or nbytes >= n * LEAST_BYTES))


def _in_order(every: Tensor) -> Tensor:
    """[C, ..., S/C, K] of all shards -> [..., S, K]: each shard's first half, then the second halves back."""
    early, late = every.chunk(2, -2)
    return torch.cat([*early, *late.flip(0)], -2)


def _cut(whole: Tensor, size: int) -> Tensor:
    """[..., S, K] -> [C, ..., S/C, K]: the positions of each of C shards."""
    chunks = whole.chunk(2 * size, -2)
    return torch.stack([torch.cat([chunks[rank], chunks[-1 - rank]], -2) for rank in range(size)])


def _start_gather(x: Tensor, tp: TensorParallel) -> Callable[[], Tensor]:
    """[..., L, K] -> [..., S, K], in the order of positions, once what this returns is called."""
    mine = x.unflatten(-2, (tp.contexts, -1)).movedim(-3, 0).contiguous()  # [shards of this rank, ..., S/C, K]
    if tp.cp.size == 1:
        return lambda: _in_order(mine)
    every = x.new_empty(tp.context_shards, *mine.shape[1:])
    work = dist.all_gather_into_tensor(every.flatten(0, 1), mine.flatten(0, 1), group=tp.cp.group, async_op=True)

    def finish() -> Tensor:
        tp.watch.lap("compute")
        present(work).wait()
        tp.watch.lap("cp")
        return _in_order(every)

    return finish


def _start_sum(whole: Tensor, tp: TensorParallel) -> Callable[[], Tensor]:
    """[..., S, K] -> [..., L, K]: this rank's positions of the sum over context ranks, once what this returns is
    called."""
    parts = _cut(whole, tp.context_shards)
    shape, started = parts.shape[1:], cast("Started", (parts[: tp.contexts], None, lambda arriving: arriving))
    if tp.cp.size > 1 and tp.exact is not None:
        started = start_tree_reduce_scatter(parts.flatten(0, 1), tp.cp)
    elif tp.cp.size > 1:
        mine = torch.empty_like(parts[0])
        work = dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=tp.cp.group, async_op=True)
        started = mine, work, lambda arriving: arriving
    arriving, work, add_up = started

    def finish() -> Tensor:
        if work is not None:
            tp.watch.lap("compute")
            work.wait()
            tp.watch.lap("cp")
        return add_up(arriving).view(tp.contexts, *shape).movedim(0, -3).flatten(-3, -2)

    return finish


def _exchange(parts: Tensor, tp: TensorParallel) -> Tensor:
    """[cp, ...]: one part for each context rank -> [cp, ...]: one part from each."""
    found = torch.empty_like(parts, memory_format=torch.contiguous_format)
    tp.watch.lap("compute")
    dist.all_to_all_single(found, parts.contiguous(), group=tp.cp.group)
    tp.watch.lap("cp")
    return found


def _heads_for_positions(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h, L, K] -> [..., h/cp, S, K]"""
    return _in_order(_exchange(x.unflatten(-3, (tp.cp.size, -1)).movedim(-4, 0), tp))


def _positions_for_heads(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h/cp, S, K] -> [..., h, L, K]"""
    return _exchange(_cut(x, tp.cp.size), tp).movedim(0, -4).flatten(-4, -3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _heads_for_positions(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _positions_for_heads(grad, ctx.tp), None


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _positions_for_heads(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _heads_for_positions(grad, ctx.tp), None


def to_heads(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h, L, K] of this rank's positions -> [..., h/cp, S, K] of all positions."""
    return _ToHeads.apply(x, tp)  # type: ignore[no-any-return,no-untyped-call] # torch types no apply


def to_positions(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., h/cp, S, K] of all positions -> [..., h, L, K] of this rank's positions."""
    return _ToPositions.apply(x, tp)  # type: ignore[no-any-return,no-untyped-call] # torch types no apply


class Gather:
    """Keys and values of one layer and microbatch on their way to all context ranks, group by group: one group is here,
    for attention, and the next one travels. Backward takes the last group first, and while it computes with one, the
    gradients of the one before are summed.

    The first group leaves before it is needed: in forward by who has the keys first, in backward when the gradient of
    the layer's output arrives.
    """

    def __init__(self, tp: TensorParallel, *, at_once: bool = False) -> None:
        """at_once: all heads are one group."""
        self._tp, self._at_once = tp, at_once
        self._mine: Sequence[Tensor] = ()
        self._coming: dict[int, Callable[[], Tensor]] = {}
        self._again: dict[int, Tensor] = {}
        self._summing: tuple[int, Callable[[], Tensor]] | None = None
        self._sums: dict[int, Tensor] = {}
        self.is_asked_again = False
        """True if backward will ask for the groups once more."""

    def start(self, both: Tensor) -> None:
        """Begin with the first group of keys and values [2, B, g, L, K]."""
        self._begin(0, _apart(both, self._number(both))[0])

    def by_groups(
        self, attend: Callable[[int, int, Tensor, Tensor], Tensor], q: Tensor, both: Tensor, *, saved: bool = False
    ) -> Tensor:
        """Queries [B, h, Q, K], keys and values [2, B, g, L, K] -> attend(number, n, [B, h/n, Q, K], [2, B, g/n, S, K])
        of each of n groups, joined along heads. Collective over context ranks, and again in backward. saved: as in
        `gathered`."""
        groups: tuple[Tensor, ...] = _Groups.apply(both, self._number(both), self)  # type: ignore[no-untyped-call] # torch types no apply
        self._mine = [group.detach() for group in groups]

        def of_group(number: int, queries: Tensor) -> Tensor:
            with gathered(groups[number], number, self, saved=saved) as whole:
                return attend(number, len(groups), queries, whole)

        mixed = [of_group(*numbered) for numbered in enumerate(q.chunk(len(groups), 1))]
        if not self.is_asked_again:
            self._mine = ()
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1)

    def _number(self, both: Tensor) -> int:
        return 1 if self._at_once else num_groups(both.shape[2], both.nbytes * self._tp.cp.size)

    def _begin(self, number: int, mine: Tensor) -> None:
        self._coming[number] = _start_gather(mine, self._tp)

    def take(self, number: int, step: int = 1) -> Tensor:
        """[2, B, g/n, S, K] of one group; then the next one begins to travel: that of number + step."""
        if number not in self._coming:
            self._begin(number, self._mine[number])
        whole = self._coming.pop(number)()
        if 0 <= number + step < len(self._mine):
            self._begin(number + step, self._mine[number + step])
        return whole

    def take_again(self, number: int) -> Tensor:
        """The same in backward, for all who ask there."""
        if number not in self._again:
            self._again[number] = self.take(number, -1)
        return self._again[number]

    def start_again(self) -> None:
        """Begin with the last group, for backward."""
        self._begin(len(self._mine) - 1, self._mine[-1])

    def sum(self, number: int, grad: Tensor) -> None:
        """Begin to sum the gradient [2, B, g/n, S, K] of a group, which backward is through with, over context ranks.
        The sum before has had its time: two of them under way would be twice the memory."""
        self._again.pop(number, None)
        self._finish_sum()
        self._summing = number, _start_sum(grad, self._tp)

    def _finish_sum(self) -> None:
        if self._summing is not None:
            (number, finish), self._summing = self._summing, None
            self._sums[number] = finish()

    def sums(self) -> Tensor:
        """The gradient [2, B, g, L, K] of this rank's keys and values."""
        self._finish_sum()
        found = [self._sums.pop(number) for number in sorted(self._sums)]
        self._mine = ()
        return found[0] if len(found) == 1 else torch.cat(found, 2)


def _apart(both: Tensor, number: int) -> tuple[Tensor, ...]:
    """[2, B, g, L, K] -> groups [2, B, g/n, L, K], each in one piece of memory."""
    return tuple(part.contiguous() for part in both.chunk(number, 2))


class _Groups(torch.autograd.Function):
    """Groups of heads. Their gradients come by way of `gather`, not of autograd, which would wait for each."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, number: int, gather: Gather) -> tuple[Tensor, ...]:
        ctx.gather = gather
        ctx.set_materialize_grads(False)
        return _apart(both, number)

    @staticmethod
    def backward(ctx: Any, *_: None) -> tuple[Tensor, None, None]:
        return ctx.gather.sums(), None, None


class _GatherPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, number: int, gather: Gather) -> Tensor:
        ctx.number, ctx.gather = number, gather
        return gather.take(number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.gather.sum(ctx.number, grad)
        return None, None, None


@contextmanager
def gathered(mine: Tensor, number: int, gather: Gather, *, saved: bool = False) -> Iterator[Tensor]:
    """Gather the whole of a group for the body: [2, B, g/n, L, K] -> [2, B, g/n, S, K].

    Tensors that the body saves for backward are kept as they are, except for views of the whole: only their shape is
    kept, and the first one that backward asks for gathers again. saved: these views are kept too, because their memory
    is short-lived anyway (recomputation).
    """
    whole: Tensor = _GatherPositions.apply(mine, number, gather)  # type: ignore[no-untyped-call] # torch types no apply
    if saved or not whole.requires_grad:
        yield whole
        return
    storage = whole.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Tensor | tuple[tuple[int, ...], tuple[int, ...], int]:
        if tensor.untyped_storage()._cdata != storage:
            return tensor.detach()
        gather.is_asked_again = True
        return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())

    def unpack(kept: Tensor | tuple[tuple[int, ...], tuple[int, ...], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return gather.take_again(number).as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        yield whole
