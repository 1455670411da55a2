"""Gradients that a step keeps, and messages between tensor ranks, in an exact run (world/exact.py) and in any other."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from roots_dist.errors import present
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.exact import Exact
from roots_dist.world.sharding import Param, ensure_grad, sum_partial_gradients
from roots_dist.world.tree_sum import tree_all_reduce


def gradient_bytes(parameter: nn.Parameter, exact: Exact | None) -> int:
    """Bytes of what passes add to of a parameter's gradient: in an exact run several tensors, if it has parts or
    uses."""
    if exact is not None:
        return exact.held_bytes(parameter)
    return 0 if parameter.grad is None else parameter.grad.nbytes


def summed_bytes(params: Sequence[Param], exact: Exact | None, tied: Collection[str]) -> int:
    """Bytes of the sums of data shards that an exact run holds at most, beside the shard that passes add to. tied:
    names of parameters that other stages hold too."""
    if exact is None:
        return 0
    total = 0
    for p in (p for p in params if p.tensor.requires_grad):
        if p.name in tied or p.is_summed_over_tp or exact.adds_contexts_first:
            total += (exact.data_shards - 1) * exact.held_bytes(p.tensor)
        else:
            sums = exact.texts_of(p.tensor) * (exact.data_shards.bit_length() - 1)
            total += sums * p.tensor.numel() * present(p.tensor.grad_dtype).itemsize
    return total


def sum_over_model(params: Sequence[Param], tp: TensorParallel) -> None:
    """Send what a step sends of the gradients that tensor ranks hold in part, or context ranks before data ranks."""
    exact = tp.exact
    summed = [p for p in params if p.is_summed_over_tp and p.tensor.requires_grad]
    if exact is None:
        sum_partial_gradients((p, ensure_grad(p)) for p in summed)
        return
    for are_cut in (False, True):
        together = [p for p in summed if (p.tensor in exact.of_cut_experts) == are_cut]
        numbers = sum(p.spec.num_shards(p.tp) * p.tensor.numel() for p in together)
        for first in together[:1]:
            shards = exact.texts_of(first.tensor) * exact.data_shards * exact.contexts_of(first.tensor)
            for _ in range(shards):
                tree_all_reduce(torch.empty(numbers, dtype=first.tensor.grad_dtype), tp.axis)
    if exact.adds_contexts_first:
        learned = [p.tensor for p in params if p.tensor.requires_grad and p.tensor not in exact.of_cut_experts]
        for _ in range(exact.data_shards if learned else 0):
            numbers = sum(tensor.numel() for tensor in learned)
            tree_all_reduce(torch.empty(numbers, dtype=learned[0].grad_dtype), tp.cp)
