"""The terms of the loss that come from routers of experts, each a mean over the whole step and all layers with experts.

    balance    each sequence alone (DeepSeek-V3, equation 17): Σ over experts of f·P, where f is how often the expert is
               used, times E/K, and P the mean of its share of the scores; 1 where all are used alike
    router_z   log²(Z) of each token's logits (ST-MoE, Zoph et al. 2022, equation 5)

A balance of a whole batch (Switch, Hugging Face) is no sum over its microbatches: it would depend on their number.
Padding counts nowhere. B sequences, S positions, T = B·S tokens, E experts, K of them per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.config.schema import Config
from roots_dist.config.sections import ObjectiveConfig
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import context_parts
from roots_dist.world.batch import PADDING, MicroBatch, Term


class Routing(NamedTuple):
    """The experts that each token goes to."""

    logits: Tensor
    """[T, E]"""
    scores: Tensor
    """[T, E], what the logits say of each expert: from 0 to 1."""
    chosen: Tensor
    """int64 [T, K]: its experts, in their order."""
    weights: Tensor
    """[T, K]: what their outputs are multiplied by."""


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
    objective: ObjectiveConfig, tp: TensorParallel, batch: MicroBatch, routings: Sequence[Routing]
) -> Iterator[Term]:
    """The terms of one layer, of each context shard of this rank, in order.

    Every tensor rank computes them alike; the gradient flows on the first one, for it is summed over all.
    """
    whole = real_tokens(batch)
    texts, parts = whole.any(1), context_parts(tp, tp.of_context(whole))

    def term(name: str, each: Tensor, counted: Tensor, count: Tensor) -> Term:
        total = each.masked_fill(~counted, 0).sum()
        return Term(name, total if tp.rank == 0 else total.detach(), count)

    if objective.balance_loss:  # every context shard has a part of each text's balance, and one counts the texts
        first, *rest = (_used(routing, real) for routing, real in zip(routings, parts))
        used = tp.cp.sum_(sum(rest, start=first))  # whole numbers, whose sum has no order
        length = whole.sum(1, keepdim=True)
        for number, (routing, real) in enumerate(zip(routings, parts)):
            is_first = tp.cp.rank == 0 and number == 0
            yield term("balance", _balance(routing, real, used, length), texts, texts.sum() * is_first)
    if objective.router_z_loss:
        for routing, real in zip(routings, parts):
            yield term("router_z", routing.logits.logsumexp(-1).square().view_as(real), real, real.sum())


def _used(routing: Routing, real: Tensor) -> Tensor:
    """[B, E]: how often the tokens of each sequence here use each expert."""
    used = torch.zeros_like(routing.scores).scatter(1, routing.chosen, 1.0)
    return _per_text(used, real)


def _balance(routing: Routing, real: Tensor, used: Tensor, length: Tensor) -> Tensor:
    """[B]: the balance of each sequence of `length` [B, 1] tokens that uses experts as often as `used` [B, E] says, the
    part of it that comes from the tokens here. How often an expert is used has no gradient, and the rest is linear in
    the tokens: the parts add up to the whole."""
    (num_experts, per_token), length = (routing.scores.shape[1], routing.chosen.shape[1]), length.clamp(min=1)
    scores = routing.scores
    share = scores / scores.sum(-1, keepdim=True)
    frequency = used * num_experts / (per_token * length)
    return torch.sum(frequency * _per_text(share, real) / length, -1)


def _per_text(each: Tensor, real: Tensor) -> Tensor:
    """[T, E] -> [B, E]: summed over the tokens of each sequence that are not padding."""
    texts: Tensor = each.unflatten(0, real.shape)
    return texts.masked_fill(~real.unsqueeze(-1), 0).sum(1)


def real_tokens(batch: MicroBatch) -> Tensor:
    """bool [B, S]: positions that hold more than padding."""
    ids = batch.document_ids
    return torch.ones_like(batch.tokens, dtype=torch.bool) if ids is None else ids != PADDING
