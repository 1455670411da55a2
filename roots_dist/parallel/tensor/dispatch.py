"""Tokens on their way to the ranks that hold their experts, and outputs on their way back: all-to-all in uneven parts.

    copies of this rank's tokens, sorted by expert [N, D] --send--> those of all ranks for the experts here [M, D]
    their outputs [M, D] --bring_back--> [N, D], in the order in which they were sent

Each rank of ep holds experts / ep neighbouring experts. Backward goes the same ways round: gradients of outputs to the
experts, gradients of tokens back. So the gradient of an expert's weights is that of all tokens of the ranks of ep. In
the parts that are sent, sizes differ: ranks tell them each other first, and the host waits for them, once in a layer
and microbatch. Without ep nothing is sent, and nothing waits. In an exact run (world/exact.py) experts compute the
tokens of each rank apart, in products of the shapes that they have on a rank that holds all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import join, split
from roots_dist.parallel.tensor.grouped import Groups, even


class _AllToAll(torch.autograd.Function):
    """[Σ sent, D] -> [Σ received, D]: the first rows to the first rank …"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        ctx.how = tp, received, sent
        return _exchange(x, tp, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.how), None, None, None


def _exchange(x: Tensor, tp: TensorParallel, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    tp.watch.lap("compute")
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=tp.ep.group)
    tp.watch.lap("ep")
    return out


class Permuted(torch.autograd.Function):
    """[N, D] -> [N, D] with row order[i] in place i; `places` is the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


@dataclass(frozen=True, eq=False)
class Route:
    """The destinations of copies of tokens, and which rows the experts here get."""

    tp: TensorParallel
    groups: Sequence[Groups]
    """The rows of the experts of this rank: of all that arrive, or in an exact run of what each rank sends."""
    sent: Sequence[int] = ()
    """Rows to each rank of ep."""
    received: Sequence[int] = ()
    """Rows from each rank of ep."""
    order: Tensor | None = None
    """int64 [M]: the rows that arrive, in the order of experts; None if they are in this order, or each rank's are."""
    places: Tensor | None = None
    """Its inverse."""

    def send(self, copies: Tensor) -> Tensor:
        """[N, D] -> [M, D]. Collective over ep."""
        if self.tp.ep.size == 1:
            return copies
        arrived: Tensor = _AllToAll.apply(copies, self.tp, self.sent, self.received)  # type: ignore[no-untyped-call] # torch types no apply
        if self.order is None:
            return arrived
        return Permuted.apply(arrived, self.order, self.places)  # type: ignore[no-any-return,no-untyped-call] # as above

    def by_groups(self, product: Callable[[int, Tensor, Groups], Tensor], arrived: Tensor) -> Tensor:
        """[M, D] -> [M, D]: the product of the rows of each of the groups, given its number."""
        if len(self.groups) == 1:
            return product(0, arrived, self.groups[0])
        parts = split(arrived, self.received, 0)
        return join([product(number, *of_rank) for number, of_rank in enumerate(zip(parts, self.groups))], 0)

    def bring_back(self, outputs: Tensor) -> Tensor:
        """[M, D] -> [N, D]. Collective over ep."""
        if self.tp.ep.size == 1:
            return outputs
        leaving = outputs
        if self.order is not None:
            leaving = Permuted.apply(outputs, self.places, self.order)  # type: ignore[no-untyped-call] # torch types no apply
        return _AllToAll.apply(leaving, self.tp, self.received, self.sent)  # type: ignore[no-any-return,no-untyped-call] # as above


def route_of(experts: Tensor, num_experts: int, tp: TensorParallel) -> Route:
    """The route of copies whose experts are these, int64 [N], ascending. Collective over ep."""
    every = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(experts, every, right=True)
    if tp.ep.size == 1:
        return Route(tp, [Groups(ends.to(torch.int32), len(experts))])
    here = num_experts // tp.ep.size
    counts = ends.diff(prepend=ends.new_zeros(1))
    told = torch.empty_like(counts)
    tp.watch.lap("compute")
    dist.all_to_all_single(told, counts, group=tp.ep.group)
    if experts.is_meta:  # only shapes (roots plan): as even as may be, and as much from each rank
        going = _of_ranks(even(len(experts), num_experts), here)
        coming = going[:1] * tp.ep.size
    else:
        going, coming = (_of_ranks(numbers, here) for numbers in torch.stack([counts, told]).tolist())
    tp.watch.lap("ep")
    sent, received = ([sum(of_rank) for of_rank in numbers] for numbers in (going, coming))
    arriving = told.view(tp.ep.size, here)  # from each rank, for each expert
    if tp.exact is not None:
        ends = arriving.cumsum(1).to(torch.int32)
        return Route(tp, list(map(Groups, ends, received, coming)), sent, received)
    sizes = [sum(of_expert) for of_expert in zip(*coming)]
    expert_of_row = torch.repeat_interleave(
        every[:here].repeat(tp.ep.size), arriving.flatten(), output_size=sum(received)
    )
    order = expert_of_row.argsort(stable=True)
    groups = Groups(arriving.sum(0).cumsum(0).to(torch.int32), sum(received), sizes)
    return Route(tp, [groups], sent, received, order, order.argsort())


def _of_ranks(numbers: Sequence[int], here: int) -> list[Sequence[int]]:
    """Numbers of all experts, in one run for each rank that holds `here` of them."""
    return [numbers[first : first + here] for first in range(0, len(numbers), here)]
