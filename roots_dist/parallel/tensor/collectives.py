"""Communication between tensor-parallel ranks, and the conjugate pairs of functions that make autograd correct across
them.

                             forward                          backward
    copy_to_tp_region        identity (SP: all-gather)        all-reduce (SP: reduce-scatter)
    reduce_from_tp_region    all-reduce (SP: reduce-scatter)  identity (SP: all-gather)
    gather_sequence          SP: all-gather                   SP: keep this rank's positions
    sum_in_tp_region         all-reduce                       all-reduce

Between the first two, each rank computes its own columns, heads or vocabulary rows. They are f and g of Megatron-LM
(Shoeybi et al. 2019, section 3) and their sequence-parallel variants (Korthikanti et al. 2022, section 4.2.2). B
sequences, S positions, D channels; s = S/tp under sequence parallelism (SP). With context parallelism S are the
positions of one context rank, and context.py gathers keys and values. dispatch.py sends tokens to experts. No other
files of layers communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roots_dist.config.parallel import CpKind
from roots_dist.parallel.tensor.deferred import DeferredWeightGrads
from roots_dist.world.exact import Exact
from roots_dist.world.fuse import Fuse, eager
from roots_dist.world.mesh import SINGLE, Axis
from roots_dist.world.positions import Positions, zigzag
from roots_dist.world.stopwatch import Stopwatch
from roots_dist.world.tree_sum import start_tree_all_reduce, start_tree_reduce_scatter, tree_all_reduce


@dataclass(eq=False)
class TensorParallel:
    """The context of every parallel layer: its tensor-parallel axis, how to use it, and the context axis."""

    axis: Axis = SINGLE
    sequence_parallel: bool = False
    """True if each rank holds S/tp positions outside the tensor-parallel regions."""
    cp: Axis = SINGLE
    """The context-parallel axis: each of its ranks holds other positions of every sequence, inside the regions too."""
    cp_kind: CpKind = "gather"
    """The way in which attention combines what context ranks hold."""
    ep: Axis = SINGLE
    """The expert-parallel axis: each of its ranks holds other experts of every layer that has some."""
    deferred: DeferredWeightGrads = field(default_factory=DeferredWeightGrads)
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Measures the time spent computing and the time spent waiting for other tensor ranks."""
    exact: Exact | None = None
    """The logical shards of an exact run; None if results may depend on the layout by rounding."""
    holds_all_positions: bool = False
    """True while texts may have any length and are not cut into context shards."""
    fuse: Fuse = eager
    """Makes one kernel of a layer's function, where the run compiles any (train.compile)."""

    @property
    def shards(self) -> int:
        """Logical tensor shards that this rank computes one by one: 1 unless the run is exact on fewer ranks."""
        return 1 if self.exact is None else self.exact.shards

    @property
    def first_shard(self) -> int:
        return self.axis.rank * self.shards

    @property
    def contexts(self) -> int:
        """Logical context shards that this rank computes one by one, the positions of one after those of another: 1
        unless the run is exact on fewer ranks."""
        return 1 if self.exact is None or self.holds_all_positions else self.exact.contexts

    @property
    def context_shards(self) -> int:
        """Context shards that a text is cut into: one for each context rank, or several."""
        return self.cp.size * self.contexts

    @property
    def computes_shards(self) -> bool:
        """True if this rank's part of a layer is several shards, computed one by one."""
        return self.shards * self.contexts > 1

    @property
    def has_partial_gradients(self) -> bool:
        """True if a parameter outside the regions, of which every rank has a copy, has a part of its gradient on each:
        that of the rank's own positions."""
        return self.sequence_parallel or self.exact is not None

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def rank(self) -> int:
        return self.axis.rank

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.axis.group

    @property
    def exchanges_heads(self) -> bool:
        """True if attention runs on all positions of some of this tensor rank's heads."""
        return self.cp.size > 1 and self.cp_kind == "heads"

    def attending(self, heads: int, part: tuple[int, int]) -> range:
        """Return the heads, among this tensor rank's, that attention runs on here; or one of several equal parts of
        them, given its number and how many there are."""
        rank, ranks = (self.cp.rank, self.cp.size) if self.exchanges_heads else (0, 1)
        number, parts = part
        size = heads // ranks // parts
        first = (rank * parts + number) * size
        return range(first, first + size)

    def _of_shards(self, seq: int) -> list[Positions]:
        """Positions of a whole sequence of each context shard of this rank."""
        first = self.cp.rank * self.contexts
        return [zigzag(seq, first + number, self.context_shards) for number in range(self.contexts)]

    def in_region(self, number: int) -> Positions:
        """Positions that this rank holds inside the regions, given their number: those of its context rank."""
        return Positions.together(self._of_shards(number * self.cp.size))

    def positions(self, seq: int) -> Positions:
        """Positions of a whole sequence that this rank holds outside the regions."""
        mine = self._of_shards(seq)
        if self.sequence_parallel:
            mine = [positions.part(self.axis.rank, self.axis.size) for positions in mine]
        return Positions.together(mine)

    def held_positions(self, number: int) -> Positions:
        """Positions that this rank holds outside the regions, given their number."""
        return self.positions(number * self.cp.size * (self.axis.size if self.sequence_parallel else 1))

    def of_context(self, whole: Tensor) -> Tensor:
        """[B, S, ...] -> [B, L, ...]: what this rank holds inside the regions of a tensor that all ranks have."""
        return Positions.together(self._of_shards(whole.shape[1])).of(whole)

    def shard_of(self, queries: range) -> int:
        """Number of the context shard, among those of this rank, that a chunk of positions belongs to."""
        if self.contexts == 1:
            return 0
        chunk = queries.start // len(queries)
        return min(chunk, 2 * self.context_shards - 1 - chunk) - self.cp.rank * self.contexts

    @contextmanager
    def without_sequence_sharding(self) -> Iterator[None]:
        """Let each rank hold all positions within the block: a single new token cannot be sharded (generation), and
        context ranks are replicas. Not for training, because parameters' specs state whose gradients are partial."""
        before = self.sequence_parallel, self.cp, self.holds_all_positions
        self.sequence_parallel, self.cp, self.holds_all_positions = False, SINGLE, True
        try:
            yield
        finally:
            self.sequence_parallel, self.cp, self.holds_all_positions = before


class Pending:
    """An asynchronous collective. Call it to wait and get the result."""

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


def start_all_reduce(x: Tensor, tp: TensorParallel) -> Pending:
    """Start a sum over tensor ranks, in place: x must belong to the caller and not be saved by autograd."""
    if tp.size == 1:
        return Pending(x, None)
    if tp.exact is not None:
        arriving, work, finish = start_tree_all_reduce(x, tp.axis)
        return Pending(arriving, work, tp.watch, finish)
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, group=tp.group, async_op=True), tp.watch)


def start_all_gather(x: Tensor, tp: TensorParallel) -> Pending:
    """[B, s, D] -> [B, S, D]: of each context shard, positions in the order of the ranks."""
    if tp.size == 1:
        return Pending(x, None)
    out = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
    work = dist.all_gather_into_tensor(out, x.contiguous(), group=tp.group, async_op=True)
    cut = (tp.size, x.shape[0], tp.contexts, -1, *x.shape[2:])
    return Pending(out, work, tp.watch, lambda o: o.view(cut).movedim(0, 2).flatten(1, 3))


def start_reduce_scatter(x: Tensor, tp: TensorParallel) -> Pending:
    """[B, S, D] -> [B, s, D]: sum over tensor ranks; each rank keeps its own positions."""
    if tp.size == 1:
        return Pending(x, None)
    parts = x.unflatten(1, (tp.contexts, tp.size, -1)).movedim(2, 0).flatten(2, 3).contiguous()  # [tp, B, s, D]
    if tp.exact is not None:
        arriving, work, finish = start_tree_reduce_scatter(parts.flatten(0, 1), tp.axis)
        return Pending(arriving, work, tp.watch, finish)
    out = x.new_empty(parts.shape[1:])
    work = dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=tp.group, async_op=True)
    return Pending(out, work, tp.watch)


def all_reduce_max(x: Tensor, tp: Axis) -> Tensor:
    """Maximum over tensor ranks, in place."""
    if tp.size > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=tp.group)
    return x


def sum_over_tp(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum over tensor ranks outside autograd. May overwrite x."""
    return tp.axis.sum_(x) if tp.exact is None else tree_all_reduce(x, tp.axis)


def gather_last_dim(x: Tensor, tp: Axis) -> Tensor:
    """[..., v] -> [..., V], without a gradient: for logits of generated text."""
    if tp.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    dist.all_gather(parts, x.contiguous(), group=tp.group)
    return torch.cat(parts, -1)


# The four asynchronous halves, which parallel/tensor/linear.py calls to overlap communication and computation.


def start_copy_to(x: Tensor, tp: TensorParallel) -> Pending:
    """Start to build the region's input [B, S, D] from this rank's x."""
    return start_all_gather(x, tp) if tp.sequence_parallel else Pending(x, None)


def start_copy_to_backward(grad: Tensor, tp: TensorParallel) -> Pending:
    """Start to sum the input gradients of all ranks, each from its own columns. Overwrites grad [B, S, D]."""
    return start_reduce_scatter(grad, tp) if tp.sequence_parallel else start_all_reduce(grad, tp)


def start_reduce_from(partial: Tensor, tp: TensorParallel) -> Pending:
    """Start to sum the outputs of all ranks, each from its own rows. Overwrites partial [B, S, D]."""
    return start_reduce_scatter(partial, tp) if tp.sequence_parallel else start_all_reduce(partial, tp)


def start_reduce_from_backward(grad: Tensor, tp: TensorParallel) -> Pending:
    """Start to build the whole gradient [B, S, D] of the output, which is the gradient of every rank's partial sum."""
    return start_all_gather(grad, tp) if tp.sequence_parallel else Pending(grad, None)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return start_copy_to(x, tp)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_copy_to_backward(grad.clone(), ctx.tp)(), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return start_reduce_from(partial.clone(), tp)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_reduce_from_backward(grad, ctx.tp)(), None


def copy_to_tp_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """[B, s, D] under SP, else [B, S, D] -> [B, S, D]."""
    return x if tp.size == 1 else _CopyToRegion.apply(x, tp)  # type: ignore[no-untyped-call] # torch types no apply


def reduce_from_tp_region(partial: Tensor, tp: TensorParallel) -> Tensor:
    """[B, S, D] -> [B, s, D] under SP, else [B, S, D]."""
    if tp.size == 1:
        return partial
    return _ReduceFromRegion.apply(partial, tp)  # type: ignore[no-any-return,no-untyped-call] # torch types no apply


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return start_all_gather(x, tp)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tp = ctx.tp
        return grad.unflatten(1, (tp.contexts, tp.size, -1))[:, :, tp.rank].flatten(1, 2).contiguous(), None


def gather_sequence(x: Tensor, tp: TensorParallel) -> Tensor:
    """[B, s, D] under SP -> [B, S, D], for layers that every tensor rank computes alike (a head with few outputs): each
    rank already has the whole gradient and keeps its own positions. After copy_to_tp_region it would be counted once
    per rank."""
    if not tp.sequence_parallel or tp.size == 1:
        return x
    return _GatherSequence.apply(x, tp)  # type: ignore[no-any-return,no-untyped-call] # torch types no apply


class _SumInRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return start_all_reduce(x.clone(), tp)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_all_reduce(grad.clone(), ctx.tp)(), None


def sum_in_tp_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum inside a region, for a statistic that each rank goes on to use for its own channels: its gradient is the sum
    of theirs, too."""
    return x if tp.size == 1 else _SumInRegion.apply(x, tp)  # type: ignore[no-untyped-call] # torch types no apply
