"""The terms of the loss that come from routers of experts, each a mean over the whole step and all layers with experts.

    balance    each sequence alone (DeepSeek-V3, equation 17): Σ over experts of f·P, where f is how often the expert is
               used, times E/K, and P the mean of its share of the scores; 1 where all are used alike
    router_z   log²(Z) of each token's logits (ST-MoE, Zoph et al. 2022, equation 5)

A balance of a whole batch (Switch, Hugging Face) is no sum over its microbatches: it would depend on their number.
Padding counts nowhere. B sequences, S positions, T = B·S tokens, E experts, K of them per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from roots_dist.config.schema import Config, ObjectiveConfig
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import PADDING, MicroBatch, Term
from roots_dist.world.mesh import Axis


def router_weights(config: Config) -> dict[str, float]:
    """Weight of each term in the loss; none if the model has no experts, or the config asks for none."""
    objective = config.objective
    weights = {"balance": objective.balance_loss, "router_z": objective.router_z_loss}
    return {name: weight for name, weight in weights.items() if weight and config.model.num_expert_layers()}


def router_counts(config: Config, batch: MicroBatch) -> dict[str, int]:
    """The divisor of each term: the number of sequences (balance) or tokens (router_z) that are not padding alone,
    times the number of layers with experts."""
    real, layers = real_tokens(batch), config.model.num_expert_layers()
    counts = {"balance": real.any(1), "router_z": real}
    return {name: layers * int(torch.count_nonzero(counts[name])) for name in router_weights(config)}


def router_terms(
    objective: ObjectiveConfig, tp: TensorParallel, batch: MicroBatch, logits: Tensor, scores: Tensor, chosen: Tensor
) -> Iterator[Term]:
    """The terms of one layer, of logits and scores [T, E] and the chosen experts, int64 [T, K].

    Every tensor rank computes them alike; the gradient flows on the first one, for it is summed over all.
    """
    whole = real_tokens(batch)
    real, texts = tp.of_context(whole), whole.any(1)

    def term(name: str, each: Tensor, counted: Tensor, count: Tensor) -> Term:
        total = each.masked_fill(~counted, 0).sum()
        return Term(name, total if tp.rank == 0 else total.detach(), count)

    if objective.balance_loss:  # every context rank has a part of each text's balance, and one counts the texts
        balance = _balance(scores, chosen, real, whole.sum(1, keepdim=True), tp.cp)
        yield term("balance", balance, texts, texts.sum() * (tp.cp.rank == 0))
    if objective.router_z_loss:
        yield term("router_z", logits.logsumexp(-1).square().view_as(real), real, real.sum())


def _balance(scores: Tensor, chosen: Tensor, real: Tensor, length: Tensor, cp: Axis) -> Tensor:
    """[B]: the balance of each sequence of `length` [B, 1] tokens, the part of it that comes from the tokens here. How
    often an expert is used has no gradient, and the rest is linear in the tokens: the parts add up to the whole."""
    (num_experts, per_token), counted = (scores.shape[1], chosen.shape[1]), real.unsqueeze(-1)
    share = scores / scores.sum(-1, keepdim=True)
    used = torch.zeros_like(scores).scatter(1, chosen, 1.0)
    share, used = (t.unflatten(0, real.shape).masked_fill(~counted, 0).sum(1) for t in (share, used))  # [B, E]
    used, length = cp.sum_(used), length.clamp(min=1)
    frequency = used * num_experts / (per_token * length)
    return torch.sum(frequency * share / length, -1)


def real_tokens(batch: MicroBatch) -> Tensor:
    """bool [B, S]: positions that hold more than padding."""
    ids = batch.document_ids
    return torch.ones_like(batch.tokens, dtype=torch.bool) if ids is None else ids != PADDING
