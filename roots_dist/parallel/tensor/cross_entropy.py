"""Output projection and cross-entropy in one function: logits exist for one chunk of tokens at a time, and are never
gathered.

    hidden [T, D], weight [v, D], targets [T] --> sum of losses, and at once the gradients of hidden and weight

For each chunk of tokens: the logits of this rank's vocabulary; maximum, Σexp and target logit reduced over tensor
ranks; then softmax - one_hot in place, and the two products for the gradients. Backward only multiplies by the scale of
the loss. Peak memory is chunk × v instead of three times T × v (logits, softmax, gradient). Computed in float32 or
wider. A run that compiles (TensorParallel.fuse) computes each of the three parts in one pass over the logits
(fused_scores.py).

Parallel cross-entropy: Shoeybi et al. 2019, section 3; z-loss: Chowdhery et al. 2022, section 5. T tokens, D width, V
vocabulary (unpadded), v vocabulary rows of this rank.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roots_dist.errors import present
from roots_dist.parallel.tensor import fused_scores
from roots_dist.parallel.tensor.collectives import TensorParallel, all_reduce_max, gather_last_dim, sum_over_tp
from roots_dist.parallel.tensor.exact import Shard, aligned, kept_shard
from roots_dist.parallel.tensor.weight_gradient import add_product_
from roots_dist.world.batch import IGNORE
from roots_dist.world.fuse import eager
from roots_dist.world.tree_sum import tree_sum


def num_real_rows(vocab: int, first: int, rows: int) -> int:
    """Number of this rank's rows that are not padding: padding must have no probability."""
    return min(max(vocab - first, 0), rows)


def linear_cross_entropy(
    tp: TensorParallel,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 1024,
    token_weights: Tensor | None = None,
    context: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) over the targets other than IGNORE, a scalar that is the same on every tensor rank, and the
    number of targets that are the most likely token. bias [v] is added to the logits, which are then capped: softcap ·
    tanh(logit / softcap) (Gemma 2).

    With label smoothing ε: (1-ε)·(-log p) + ε·mean over the vocabulary of -log p. With z-loss: + z·log²Z. `hidden` must
    come from collectives.copy_to_tp_region, which sums its gradient over tensor ranks. token_weights [T]: factor of
    each token's loss; no gradient flows to them. context: which of this rank's context shards the tokens are of (exact
    runs).
    """
    grad_enabled = torch.is_grad_enabled()  # inside the autograd function it is always False
    total, hits = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call] # torch types no apply
        hidden,
        weight,
        bias,
        targets,
        tp,
        vocab,
        softcap,
        smoothing,
        z_loss,
        chunk,
        token_weights,
        context,
        grad_enabled,
    )
    return total, hits


def logits(
    tp: TensorParallel,
    hidden: Tensor,
    weight: Tensor,
    vocab: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[..., D] -> float32 [..., V], gathered on every tensor rank. For generation."""
    return capped(gather_last_dim(F.linear(hidden, weight, bias), tp.axis)[..., :vocab].float(), softcap)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


@torch.no_grad()
def target_scores(
    tp: TensorParallel,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """log p(target) of each of the T targets (0 for IGNORE), and whether it is the most likely token. Equal on every
    tensor rank; nothing is gathered."""

    def of_chunk(part: slice) -> tuple[Tensor, Tensor]:  # the scores of all its words are gone when it returns
        found = _score_chunk(tp, hidden[part], weight, bias, targets[part], vocab, softcap)
        return found.log_sum - found.target_score, found.target_score >= 0

    losses, is_best = zip(*(of_chunk(slice(start, start + chunk)) for start in range(0, hidden.shape[0], chunk)))
    scored = targets != IGNORE
    return -torch.cat(losses).masked_fill(~scored, 0), torch.cat(is_best) & scored


class Rows(NamedTuple):
    """Rows of the vocabulary whose scores are computed together: those of this rank, or of one of its tensor shards
    (exact runs)."""

    first: int
    """number of the first one in the whole vocabulary"""
    held: slice
    """those of this rank's rows, without padding"""
    weight: Tensor
    bias: Tensor | None


def rows_of(tp: TensorParallel, weight: Tensor, bias: Tensor | None, vocab: int) -> list[Rows]:
    """This rank's rows in one, or in an exact run shard by shard."""
    size, made = weight.shape[0] // tp.shards, []
    for shard in range(tp.shards):
        first = tp.rank * weight.shape[0] + shard * size
        index = slice(shard * size, shard * size + num_real_rows(vocab, first, size))
        values, biases = weight[index], None if bias is None else bias[index]
        if tp.shards > 1:
            values, biases = aligned(values), None if biases is None else aligned(biases)
        made.append(Rows(first, index, values, biases))
    return made


class _Scores(NamedTuple):
    """The scores of c tokens for some rows [c, v]."""

    is_local: Tensor
    """bool [c]: whether the target is among these rows"""
    local: Tensor
    """int64 [c, 1]: index of the target among them"""
    exp: Tensor
    """[c, v]: exponentials of the scores; the logits where the run compiles"""
    slope: Tensor | None
    """[c, v]: derivative of the scores by their logits; None where it is 1 (no soft cap)"""


class _Chunk(NamedTuple):
    """Statistics of c tokens after their logits were reduced over tensor ranks. target_score, log_sum and sum_scores
    refer to scores minus their maximum (max_score) over the whole vocabulary."""

    scored: Tensor
    parts: list[_Scores]
    max_score: Tensor
    target_score: Tensor
    sum_exp: Tensor
    sum_scores: Tensor

    @property
    def log_sum(self) -> Tensor:
        return self.sum_exp.log()


def _score_chunk(
    tp: TensorParallel,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    vocab: int,
    softcap: float | None,
    sum_all: bool = False,
    slopes: bool = False,
) -> _Chunk:
    """Compute the statistics of a chunk. sum_all: also sum all scores (label smoothing). slopes: keep what the
    gradient through a soft cap needs."""
    scored, fused = target != IGNORE, tp.fuse is not eager
    parts = [_score_rows(rows, h, target, scored, softcap, slopes, fused) for rows in rows_of(tp, weight, bias, vocab)]
    some = [part.exp for part in parts if part.exp.shape[1]]
    highest = [tp.fuse(fused_scores.highest)(logits, softcap) if fused else logits.amax(1) for logits in some]
    if highest:
        max_score = all_reduce_max(reduce(torch.maximum, highest), tp.axis)  # [c]
    else:  # this rank has only padding, with a tiny vocabulary
        exact = torch.promote_types(h.dtype, torch.float32)
        max_score = all_reduce_max(h.new_full(target.shape, -torch.inf, dtype=exact), tp.axis)
    sums = []
    for is_local, local, scores, _ in parts:
        if fused and scores.shape[1]:
            sums.append(tp.fuse(fused_scores.sums)(scores, max_score, local, is_local, softcap, sum_all))
            continue
        target_score = scores.new_zeros(scores.shape[:1])
        if scores.shape[1]:
            scores -= max_score.unsqueeze(1)
            target_score = scores.gather(1, local).squeeze(1).masked_fill(~is_local, 0)
        sum_scores = scores.sum(1) if sum_all else target_score.new_zeros(target_score.shape)
        scores.exp_()
        sums.append(torch.stack([target_score, scores.sum(1), sum_scores]))
    target_score, sum_exp, sum_scores = sum_over_tp(tree_sum(sums), tp)  # each [c]
    return _Chunk(scored, parts, max_score, target_score, sum_exp, sum_scores)


def _score_rows(
    rows: Rows, h: Tensor, target: Tensor, scored: Tensor, softcap: float | None, slopes: bool, fused: bool
) -> _Scores:
    """The scores themselves in the place of their exponentials, or the logits."""
    real = rows.weight.shape[0]
    local = target - rows.first
    is_local = scored & (local >= 0) & (local < real)
    local = local.masked_fill(~is_local, 0).unsqueeze(1)
    scores = F.linear(h, rows.weight, rows.bias)
    if fused:
        return _Scores(is_local, local, scores, None)
    scores = capped(scores.to(torch.promote_types(h.dtype, torch.float32)), softcap)  # [c, v]
    slope = 1 - (scores / softcap).square() if softcap is not None and slopes else None
    return _Scores(is_local, local, scores, slope)


def _gradient_(
    scores: _Scores, scored: Tensor, factor: Tensor, smoothing: float, share: float, token_weights: Tensor | None
) -> Tensor:
    """[c, v]: d loss / d logits, as fused_scores.gradient, in the place of the exponentials."""
    is_local, local, grad, slope = scores
    grad *= factor.masked_fill(~scored, 0).unsqueeze(1)
    if smoothing:
        # a bool would be rounded to float32
        grad -= share * scored.to(grad.dtype).unsqueeze(1)
    if grad.shape[1]:
        grad.scatter_add_(1, local, -(1 - smoothing) * is_local.to(grad.dtype).unsqueeze(1))
    if slope is not None:
        grad *= slope
    if token_weights is not None:
        grad *= token_weights.unsqueeze(1)
    return grad


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
        softcap: float | None,
        smoothing: float,
        z_loss: float,
        chunk: int,
        token_weights: Tensor | None,
        context: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        exact, share = torch.promote_types(hidden.dtype, torch.float32), smoothing / vocab
        total, hits = hidden.new_zeros((), dtype=exact), torch.zeros((), dtype=torch.int64, device=hidden.device)
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        shards = rows_of(tp, weight, bias, vocab)
        grad_hiddens = [torch.empty_like(hidden) for _ in shards] if need_hidden else []
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and need_bias else None

        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h = hidden[part]
            chunk_scores = _score_chunk(
                tp, h, weight, bias, targets[part], vocab, softcap,
                sum_all=smoothing > 0, slopes=need_hidden or need_weight or need_bias,
            )  # fmt: skip
            loss = chunk_scores.log_sum - (1 - smoothing) * chunk_scores.target_score - share * chunk_scores.sum_scores
            log_z = chunk_scores.log_sum + chunk_scores.max_score
            if z_loss:
                loss = loss + z_loss * log_z.square()
            if token_weights is not None:
                loss = loss * token_weights[part]
            total += loss.masked_fill(~chunk_scores.scored, 0).sum()
            hits += ((chunk_scores.target_score >= 0) & chunk_scores.scored).sum()
            if not (need_hidden or need_weight or need_bias):
                continue

            # d loss / d scores = p·(1 + 2z·log Z) - (1-ε)·one_hot - ε/V, and 0 where nothing is scored
            factor = (1 + 2 * z_loss * log_z) / chunk_scores.sum_exp if z_loss else chunk_scores.sum_exp.reciprocal()
            weights = None if token_weights is None else token_weights[part]
            for number, (rows, scores) in enumerate(zip(shards, chunk_scores.parts)):
                if tp.fuse is eager or not scores.exp.shape[1]:
                    grad = _gradient_(scores, chunk_scores.scored, factor, smoothing, share, weights)
                else:
                    grad = tp.fuse(fused_scores.gradient)(
                        scores.exp, chunk_scores.max_score, scores.local, scores.is_local, chunk_scores.scored, factor,
                        smoothing, share, softcap, weights,
                    )  # fmt: skip
                if grad_bias is not None:
                    grad_bias[rows.held] += grad.sum(0, dtype=exact)
                grad = grad.to(hidden.dtype)
                if grad_hiddens:
                    grad_hiddens[number][part] = grad @ rows.weight
                if grad_weight is not None:
                    add_product_(grad_weight[rows.held], grad.t(), h)
        ctx.save_for_backward(grad_weight, grad_bias, *grad_hiddens)
        ctx.dtypes = [*(_grad_dtype(parameter) for parameter in (weight, bias)), *[hidden.dtype] * len(grad_hiddens)]
        ctx.kept = [kept_shard(tp, parameter, context) for parameter in (weight, bias)]
        ctx.parameter = weight if tp.exact is None and weight.is_leaf else None
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        # in place: backward runs once, and the weight's gradient is large
        saved_weight, *others = ctx.saved_tensors
        before = None if ctx.parameter is None else ctx.parameter.grad
        if saved_weight is not None and before is not None and before.dtype == saved_weight.dtype:
            before.addcmul_(saved_weight, grad)  # one pass where autograd would take two: of earlier microbatches
            saved_weight = None
        weight, bias, *hiddens = (
            None if saved is None else saved.mul_(grad).to(dtype)
            for saved, dtype in zip((saved_weight, *others), ctx.dtypes)
        )
        weight, bias = (_unless_kept(found, kept) for found, kept in zip((weight, bias), ctx.kept))
        hidden = tree_sum([present(part) for part in hiddens]) if hiddens else None
        return hidden, weight, bias, *(None,) * 10


def _unless_kept(gradient: Tensor | None, kept: Shard | None) -> Tensor | None:
    """The gradient for autograd, unless it is kept apart."""
    if kept is None or gradient is None:
        return gradient
    kept.grad.add_(gradient)
    return None


def _grad_dtype(parameter: Tensor | None) -> torch.dtype | None:
    """Dtype of a parameter's .grad: what is summed in float32 is not rounded before it is kept in it."""
    if parameter is None or not parameter.is_leaf:
        return None if parameter is None else parameter.dtype
    return parameter.grad_dtype
