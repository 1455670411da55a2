"""Words drawn from the logits that tensor ranks hold in parts: the same words in every layout, and nothing is gathered.

    hidden [N, D], weight [v, D] --logits + Gumbel noise, the largest over all ranks--> ids [N]

The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954; ELECTRA's code). The noise of a word
is a function of (seed, step, sample, position, word). N hidden places, D width, v words of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from roots_dist.parallel.tensor.collectives import TensorParallel, all_reduce_max
from roots_dist.parallel.tensor.cross_entropy import num_real_words
from roots_dist.world import rng


@torch.no_grad()
def draw(
    tp: TensorParallel,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    *,
    vocab: int,
    chunk: int = 1024,
) -> Tensor:
    """int64 [N], equal on every tensor rank; never a padded word. rows: int64 [N], the key of each place's noise."""
    parts = [
        _chunk(tp, hidden[i : i + chunk], weight, bias, rows[i : i + chunk], vocab)
        for i in range(0, hidden.shape[0], chunk)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0)


def _chunk(tp: TensorParallel, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, vocab: int) -> Tensor:
    first = tp.rank * weight.shape[0]
    real = num_real_words(vocab, first, weight.shape[0])
    exact = torch.promote_types(hidden.dtype, torch.float32)
    best = hidden.new_full(rows.shape, -torch.inf, dtype=exact)
    word = torch.full_like(rows, vocab)
    if real:
        columns = torch.arange(first, first + real, dtype=torch.int32, device=hidden.device)
        uniform = (rng.bits(rows, columns).to(exact) + (2.0**31 + 0.5)) * 2.0**-32  # in (0, 1)
        noise = -torch.log(-torch.log(uniform.clamp(2.0**-33, 1 - 2.0**-24)))
        best, at = (F.linear(hidden, weight[:real], None if bias is None else bias[:real]).to(exact) + noise).max(1)
        word = at + first
    top = all_reduce_max(best.clone(), tp.axis)
    word = torch.where(best == top, word, vocab)  # a tie goes to the first word
    if tp.size > 1:
        dist.all_reduce(word, dist.ReduceOp.MIN, group=tp.group)
    return word
