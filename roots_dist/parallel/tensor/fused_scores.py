"""The arithmetic of cross_entropy.py on logits between its messages, in a form that compiles to one kernel each.

    logits --highest--> maximum over tensor ranks --sums--> sums over tensor ranks --gradient--> of the logits

Each reads the logits, in the dtype of their product, and computes their exponentials again: nothing of their size is
written but the gradient. Where nothing is compiled that would be slower, and cross_entropy.py works in place. c tokens,
v vocabulary rows of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def highest(logits: Tensor, softcap: float | None) -> Tensor:
    """[c, v] -> the largest score of each token [c]."""
    return _scores(logits, softcap).amax(1)


def sums(
    logits: Tensor, max_score: Tensor, local: Tensor, is_local: Tensor, softcap: float | None, sum_all: bool
) -> Tensor:
    """[3, c], of scores minus max_score: that of the target (0 where it is not among these rows), Σexp, and Σ or 0."""
    scores = _scores(logits, softcap) - max_score.unsqueeze(1)
    target_score = scores.gather(1, local).squeeze(1).masked_fill(~is_local, 0)
    sum_scores = scores.sum(1) if sum_all else torch.zeros_like(target_score)
    return torch.stack([target_score, scores.exp().sum(1), sum_scores])


def gradient(
    logits: Tensor,
    max_score: Tensor,
    local: Tensor,
    is_local: Tensor,
    scored: Tensor,
    factor: Tensor,
    smoothing: float,
    share: float,
    softcap: float | None,
    token_weights: Tensor | None,
) -> Tensor:
    """[c, v]: d loss / d logits, in their dtype: exp · factor - (1 - smoothing) · one_hot - share, where scored."""
    scores = _scores(logits, softcap)
    numbers = torch.arange(logits.shape[1], device=logits.device)
    hit = (numbers == local) & is_local.unsqueeze(1)
    grad = (scores - max_score.unsqueeze(1)).exp() * factor.unsqueeze(1) - (1 - smoothing) * hit.to(scores.dtype)
    if share:
        grad = grad - share
    if softcap is not None:
        grad = grad * (1 - (scores / softcap).square())
    weights = scored.to(scores.dtype) if token_weights is None else token_weights * scored
    return (grad * weights.unsqueeze(1)).to(logits.dtype)


def _scores(logits: Tensor, softcap: float | None) -> Tensor:
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
