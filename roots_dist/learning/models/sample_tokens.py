"""Sample tokens from logits that tensor ranks hold in parts: the same tokens in every layout, without a gather.

    hidden [N, D], weight [v, D] --logits + Gumbel noise, argmax over all ranks--> ids [N]

The argmax of logits plus Gumbel noise is a sample from their softmax (Gumbel 1954; ELECTRA's code). The noise of a
token is a function of (seed, step, sample, position, token). N masked positions, D width, v vocabulary rows of this
rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from roots_dist.parallel.tensor.collectives import TensorParallel, all_reduce_max
from roots_dist.parallel.tensor.cross_entropy import rows_of
from roots_dist.world import rng


@torch.no_grad()
def sample_tokens(
    tp: TensorParallel,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    *,
    vocab: int,
    chunk: int = 1024,
) -> Tensor:
    """int64 [N], equal on every tensor rank, never a padding row. rows: int64 [N], the key of each position's noise."""
    parts = [
        _chunk(tp, hidden[i : i + chunk], weight, bias, rows[i : i + chunk], vocab)
        for i in range(0, hidden.shape[0], chunk)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0)


def _chunk(tp: TensorParallel, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, vocab: int) -> Tensor:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    best = hidden.new_full(rows.shape, -torch.inf, dtype=exact)
    word = torch.full_like(rows, vocab)
    for first, _, values, biases in rows_of(tp, weight, bias, vocab):
        if len(values) == 0:
            continue
        columns = torch.arange(first, first + len(values), dtype=torch.int32, device=hidden.device)
        uniform = (rng.bits(rows, columns).to(exact) + (2.0**31 + 0.5)) * 2.0**-32  # in (0, 1)
        noise = -torch.log(-torch.log(uniform.clamp(2.0**-33, 1 - 2.0**-24)))
        highest, at = (F.linear(hidden, values, biases).to(exact) + noise).max(1)
        word = torch.where(highest > best, at + first, word)
        best = torch.maximum(best, highest)
    top = all_reduce_max(best.clone(), tp.axis)
    word = torch.where(best == top, word, vocab)  # a tie goes to the lowest id
    if tp.size > 1:
        dist.all_reduce(word, dist.ReduceOp.MIN, group=tp.group)
    return word
