"""The output projection and the cross-entropy in one: logits exist for a few tokens at a time and are never gathered.

    hidden [T, D], weight [v, D], targets [T] --> sum of losses, and at once the gradients of hidden and weight

For each chunk of tokens: logits of this rank's words, the maximum, Σexp and the target's logit summed over tensor
ranks, then softmax - one_hot in place and the two products that the gradients need. Backward only multiplies by the
loss's scale. Peak memory is chunk × v instead of T × v three times over (logits, softmax, gradient). In float32 at
least.

Parallel cross-entropy: Shoeybi et al. 2019, section 3; z-loss: Chowdhery et al. 2022, section 5.
T tokens, D width, V words (true number), v = words of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roots_dist.parallel.tensor.collectives import TensorParallel, all_reduce_max, gather_last_dim
from roots_dist.world.batch import IGNORE


def num_real_words(vocab: int, first: int, rows: int) -> int:
    """How many of this rank's rows are words: the vocabulary is padded, and padding must have no probability."""
    return min(max(vocab - first, 0), rows)


def linear_cross_entropy(
    tp: TensorParallel,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab: int,
    bias: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Sum over targets (other than IGNORE) of -log p(target), a scalar, the same on every tensor rank; and how many of
    the targets are the likeliest word. bias [v] is added to the logits.

    With label smoothing ε: (1-ε)·(-log p) + ε·mean over the vocabulary of -log p. With z-loss: + z·log²Z.
    hidden has left its region's entrance (collectives.copy_to_tp_region), so that its gradient is summed over tensor
    ranks there.
    """
    learn = torch.is_grad_enabled()  # inside the function it always says no
    total, hits = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call] # torch types no apply
        hidden, weight, bias, targets, tp, vocab, smoothing, z_loss, chunk, learn
    )
    return total, hits


def logits(tp: TensorParallel, hidden: Tensor, weight: Tensor, vocab: int, bias: Tensor | None = None) -> Tensor:
    """[..., D] -> float32 [..., V], gathered on every tensor rank. For generation."""
    return gather_last_dim(F.linear(hidden, weight, bias), tp.axis)[..., :vocab].float()


@torch.no_grad()
def target_scores(
    tp: TensorParallel,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab: int,
    bias: Tensor | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """For each of the T targets log p(target), 0 for IGNORE, and whether it is the likeliest word. Equal on every
    tensor rank; nothing is gathered."""
    found = [
        _of_targets(tp, hidden[i : i + chunk], weight, bias, targets[i : i + chunk], vocab)
        for i in range(0, hidden.shape[0], chunk)
    ]
    losses = torch.cat([f.log_sum - f.hit for f in found])
    scored = targets != IGNORE
    return -losses.masked_fill(~scored, 0), torch.cat([f.hit >= 0 for f in found]) & scored


class _Chunk(NamedTuple):
    """What is known of c tokens after their logits have been looked at on all tensor ranks. hit, log_sum, sum_scores:
    of scores less their maximum (peak) over the whole vocabulary."""

    scored: Tensor
    here: Tensor
    """bool [c]: the target is one of this rank's words"""
    local: Tensor
    """int64 [c, 1]: which"""
    exp: Tensor
    """[c, v]"""
    peak: Tensor
    hit: Tensor
    sum_exp: Tensor
    sum_scores: Tensor

    @property
    def log_sum(self) -> Tensor:
        return self.sum_exp.log()


def _of_targets(
    tp: TensorParallel, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, vocab: int, summed: bool = False
) -> _Chunk:
    """summed: sum_scores is wanted too (label smoothing)."""
    first = tp.rank * weight.shape[0]
    real = num_real_words(vocab, first, weight.shape[0])
    scored = target != IGNORE
    local = target - first
    here = scored & (local >= 0) & (local < real)
    local = local.masked_fill(~here, 0).unsqueeze(1)
    scores = F.linear(h, weight[:real], None if bias is None else bias[:real])
    scores = scores.to(torch.promote_types(h.dtype, torch.float32))  # [c, v]
    if real:
        peak = all_reduce_max(scores.amax(1), tp.axis)  # [c]
        scores -= peak.unsqueeze(1)
        hit = scores.gather(1, local).squeeze(1).masked_fill(~here, 0)
    else:  # padding only: this rank has no word of a tiny vocabulary
        peak = all_reduce_max(scores.new_full(scores.shape[:1], -torch.inf), tp.axis)
        hit = scores.new_zeros(scores.shape[:1])
    sum_scores = scores.sum(1) if summed else hit.new_zeros(hit.shape)
    scores.exp_()
    hit, sum_exp, sum_scores = tp.axis.sum_(torch.stack([hit, scores.sum(1), sum_scores]))  # each [c]
    return _Chunk(scored, here, local, scores, peak, hit, sum_exp, sum_scores)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tp: TensorParallel,
        vocab: int,
        smoothing: float,
        z_loss: float,
        chunk: int,
        learn: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total, hits = hidden.new_zeros((), dtype=exact), torch.zeros((), dtype=torch.int64, device=hidden.device)
        need_hidden, need_weight, need_bias = (learn and need for need in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and need_bias else None

        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h = hidden[part]
            found = _of_targets(tp, h, weight, bias, targets[part], vocab, summed=smoothing > 0)
            loss = found.log_sum - (1 - smoothing) * found.hit - smoothing / vocab * found.sum_scores
            log_z = found.log_sum + found.peak
            if z_loss:
                loss = loss + z_loss * log_z.square()
            total += loss.masked_fill(~found.scored, 0).sum()
            hits += ((found.hit >= 0) & found.scored).sum()
            if not (need_hidden or need_weight or need_bias):
                continue

            # d loss / d scores = p·(1 + 2z·log Z) - (1-ε)·one_hot - ε/V, and 0 where nothing is scored
            grad, real = found.exp, found.exp.shape[1]
            factor = (1 + 2 * z_loss * log_z) / found.sum_exp if z_loss else found.sum_exp.reciprocal()
            grad *= factor.masked_fill(~found.scored, 0).unsqueeze(1)
            if smoothing:
                grad -= (smoothing / vocab) * found.scored.to(exact).unsqueeze(1)  # a bool would be rounded to float32
            if real:
                grad.scatter_add_(1, found.local, -(1 - smoothing) * found.here.to(exact).unsqueeze(1))
            if grad_bias is not None:
                grad_bias[:real] += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight[:real]
            if grad_weight is not None and exact == hidden.dtype:
                grad_weight[:real].addmm_(grad.t(), h)
            elif grad_weight is not None:
                grad_weight[:real] += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        # in place: the graph is walked once, and the weight's gradient is big
        grads = (None if saved is None else saved.mul_(grad).to(ctx.dtype) for saved in ctx.saved_tensors)
        return *grads, *(None,) * 7
