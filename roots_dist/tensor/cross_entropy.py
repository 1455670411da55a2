"""The output projection and the cross-entropy in one: logits exist for a few tokens at a time and are never gathered.

    hidden [T, D], weight [v, D], targets [T] --> sum of losses, and at once the gradients of hidden and weight

For each chunk of tokens: logits of this rank's words, the maximum, Σexp and the target's logit summed over tensor ranks,
then softmax - one_hot in place and the two products that the gradients need. Backward only multiplies by the loss's scale.
Peak memory is chunk × v instead of T × v three times over (logits, softmax, gradient). In float32 at least.

Parallel cross-entropy: Shoeybi et al. 2019, section 3; z-loss: Chowdhery et al. 2022, section 5.
T tokens, D width, V words (true number), v = words of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roots_dist.objectives.base import IGNORE
from roots_dist.tensor.collectives import Split, gather_last, max_


def num_real_words(vocab: int, first: int, rows: int) -> int:
    """How many of this rank's rows are words: the vocabulary is padded, and padding must have no probability."""
    return min(max(vocab - first, 0), rows)


def linear_cross_entropy(
    split: Split,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab: int,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> Tensor:
    """Sum over targets (other than IGNORE) of -log p(target), a scalar, the same on every tensor rank.

    With label smoothing ε: (1-ε)·(-log p) + ε·mean over the vocabulary of -log p. With z-loss: + z·log²Z.
    hidden has left its region's entrance (collectives.enter), so that its gradient is summed over tensor ranks there.
    """
    learn = torch.is_grad_enabled()  # inside the function it always says no
    return _LinearCrossEntropy.apply(hidden, weight, targets, split, vocab, smoothing, z_loss, chunk, learn)


def logits(split: Split, hidden: Tensor, weight: Tensor, vocab: int) -> Tensor:
    """[..., D] -> [..., V], gathered on every tensor rank. For generation."""
    return gather_last(hidden @ weight.t(), split.tp)[..., :vocab].float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, split, vocab, smoothing, z_loss, chunk, learn):
        first = split.tp.rank * weight.shape[0]
        words = weight[: num_real_words(vocab, first, weight.shape[0])]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        learn = learn and any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if learn else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if learn else None

        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part], targets[part]
            scored = target != IGNORE
            local = target - first
            here = scored & (local >= 0) & (local < words.shape[0])
            local = local.masked_fill(~here, 0).unsqueeze(1)

            scores = (h @ words.t()).to(exact)  # [c, v]
            if words.shape[0]:
                peak = max_(scores.amax(1), split.tp)  # [c]
                scores -= peak.unsqueeze(1)
                hit = scores.gather(1, local).squeeze(1).masked_fill(~here, 0)
            else:  # padding only: this rank has no word of a tiny vocabulary
                peak = max_(scores.new_full(scores.shape[:1], -torch.inf), split.tp)
                hit = scores.new_zeros(scores.shape[:1])
            sum_scores = scores.sum(1) if smoothing else hit.new_zeros(hit.shape)
            scores.exp_()
            hit, sum_exp, sum_scores = split.tp.sum_(torch.stack([hit, scores.sum(1), sum_scores]))  # each [c]

            log_sum = sum_exp.log()
            loss = log_sum - (1 - smoothing) * hit - smoothing / vocab * sum_scores
            log_z = log_sum + peak
            if z_loss:
                loss = loss + z_loss * log_z.square()
            total += loss.masked_fill(~scored, 0).sum()
            if not learn:
                continue

            # d loss / d scores = p·(1 + 2z·log Z) - (1-ε)·one_hot - ε/V, and 0 where nothing is scored
            factor = (1 + 2 * z_loss * log_z) / sum_exp if z_loss else sum_exp.reciprocal()
            scores *= factor.masked_fill(~scored, 0).unsqueeze(1)
            if smoothing:
                scores -= (smoothing / vocab) * scored.unsqueeze(1)
            if words.shape[0]:
                scores.scatter_add_(1, local, -(1 - smoothing) * here.to(exact).unsqueeze(1))
            grad_scores = scores.to(hidden.dtype)
            grad_hidden[part] = grad_scores @ words
            if exact == hidden.dtype:
                grad_weight[: words.shape[0]].addmm_(grad_scores.t(), h)
            else:
                grad_weight[: words.shape[0]] += grad_scores.t() @ h
        if learn:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        return (
            grad_hidden.mul_(grad) if need_hidden else None,  # in place: the graph is walked once, and the weight's is big
            grad_weight.mul_(grad).to(ctx.weight_dtype) if need_weight else None,
            *(None,) * 7,
        )
