"""A mixture of experts in the place of a block's MLP (Shazeer et al. 2017): of E MLPs each token uses K.

    x --Router--> K experts of each token, their weights
    x --_Sent: sorted by expert--> each expert on its tokens --Permuted--> the sum of a token's K outputs, weighted
    x --shared expert, if there is one, with its gate--> added

All of it is one tensor-parallel region: every rank routes all tokens alike, computes its own columns of every expert,
and the partial outputs of all experts are summed over ranks once. What a rank knows of the gradients of router and gate
comes from its own columns, so theirs are partial. With expert parallelism a rank holds E/ep experts of a layer, and
tokens travel to them and back (parallel/tensor/dispatch.py), inside of the region. No token is dropped, and nothing is
added up in an order that depends on who comes first. An exact run (world/exact.py) computes all of it, the router too,
for each logical shard of the region: each has its own part of the gradients of router, gate and input. B sequences, S
positions, T = B·S tokens, D model width, E experts of which each token uses K; s = S/tp under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.learning.models.init_stds import InitStds
from roots_dist.learning.models.mlp import MLP, mlp_flops
from roots_dist.learning.models.router_terms import Routing, real_tokens, router_terms
from roots_dist.parallel.tensor.collectives import TensorParallel, copy_to_tp_region, reduce_from_tp_region
from roots_dist.parallel.tensor.dispatch import Permuted, Route, route_of
from roots_dist.parallel.tensor.exact import (
    RegionShard,
    context_parts,
    contiguous_gradient,
    join_contexts,
    spread,
)
from roots_dist.parallel.tensor.grouped import Groups, grouped_linear, of_whole_vectors, pack
from roots_dist.parallel.tensor.linear import column_parallel
from roots_dist.world.batch import MicroBatch, Term
from roots_dist.world.mesh import SINGLE
from roots_dist.world.sharding import ShardSpec, declare
from roots_dist.world.tree_sum import tree_sum

OF_REPORT, OF_STEP = "report", "step"
"""Readers of the number of tokens per expert; each gets the count since it last asked."""


class _Alike(nn.Module):
    """A matrix that every tensor rank multiplies the region's whole input by. Its gradient is partial: what follows is
    multiplied by a rank's own columns."""

    def __init__(self, tp: TensorParallel, width: int, features: int, std: float):
        super().__init__()
        self.weight = declare(self, "weight", ShardSpec(shape=(features, width), std=std, partial=True), tp.axis)


class Router(_Alike):
    """Chooses the experts of each token, in float32 at least: what is rounded more coarsely would choose others."""

    def __init__(self, config: Config, tp: TensorParallel):
        m = config.model
        super().__init__(tp, m.hidden, m.experts or 0, m.std())
        self.per_token, self.normalize, self.factor = (
            m.experts_per_token,
            m.normalize_expert_weights,
            m.routed_scaling_factor,
        )
        self.alone = m.router_score == "sigmoid"
        self.groups, self.groups_per_token = m.expert_groups, m.groups_per_token
        self.group_score_experts = m.group_score_experts
        bias = ShardSpec(shape=(m.experts or 0,), by_rule=True)
        self.bias = declare(self, "bias", bias, tp.axis) if m.router_bias else None

    def forward(self, tokens: Tensor, chosen: Tensor | None = None, *, weight: Tensor | None = None) -> Routing:
        """[T, D] -> where they go. chosen: what has been chosen before. weight: the router's own, of which one shard
        has a part of the gradient."""
        exact = torch.promote_types(tokens.dtype, torch.float32)
        logits = F.linear(tokens.to(exact), (self.weight if weight is None else weight).to(exact))
        scores = logits.sigmoid() if self.alone else logits.softmax(-1)
        if chosen is None:
            judged = scores if self.bias is None else scores + self.bias
            chosen = choose(judged, self.per_token, self.groups, self.groups_per_token, self.group_score_experts)
        weights = scores.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits, scores, chosen, weights * self.factor)


@torch.no_grad()
def choose(
    scores: Tensor, per_token: int, groups: int = 1, groups_per_token: int = 1, group_score_experts: int = 2
) -> Tensor:
    """int64 [T, K], ascending: the experts with the highest scores [T, E]; of equal ones the first, which topk does not
    promise. With groups of neighbours, only those of the groups with the highest sums of their best."""
    if groups > 1:
        grouped = scores.unflatten(1, (groups, -1))  # [T, G, E/G]
        sums = grouped.topk(min(group_score_experts, grouped.shape[2])).values.sum(-1)
        best = sums.sort(dim=-1, descending=True, stable=True).indices[:, :groups_per_token]
        outside = torch.ones_like(sums, dtype=torch.bool).scatter(1, best, False)
        scores = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :per_token]
    return best.sort(-1).values


class _Sent(torch.autograd.Function):
    """[T, D] -> [T·K, D]: a copy of each token for each of its experts, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, places: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.per_token = per_token
        return tokens.index_select(0, order.div(per_token, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places).unflatten(0, (-1, ctx.per_token)).sum(1), None, None, None


class Choice(NamedTuple):
    """The decision of a layer for a microbatch, which recomputation takes again."""

    experts: Tensor
    """int64 [T, K]"""
    order: Tensor
    """int64 [T·K]: the copies in the order of their experts."""
    places: Tensor
    """Its inverse."""
    route: Route


class _Part(NamedTuple):
    """The tokens of one shard of the region, and where they go."""

    shard: RegionShard
    tokens: Tensor
    """[T, D]"""
    routing: Routing


class Experts(nn.Module):
    """E MLPs, the router before them, and the shared one beside them."""

    def __init__(self, config: Config, tp: TensorParallel, name: str, inits: InitStds):
        super().__init__()
        m = config.model
        self.tp, self.name, self.objective, self.num_experts = tp, name, config.objective, m.experts or 0

        def mlp(ffn: int, of_expert: bool = False) -> MLP:
            return MLP(config, tp, name, inits, ffn=ffn, of_expert=of_expert)

        self.router = Router(config, tp)
        each = self.num_experts // tp.ep.size
        here = range(tp.ep.rank * each, (tp.ep.rank + 1) * each)
        self.experts = nn.ModuleDict({str(number): mlp(m.width_of_expert(), of_expert=True) for number in here})
        self.shared = mlp(m.shared_expert_ffn) if m.shared_expert_ffn else None
        self.shared_gate = _Alike(tp, m.hidden, 1, m.std()) if m.shared_expert_gate else None
        self.loads: dict[str, Tensor] = {}
        """int64 [E] for each of those who count: tokens that this rank has sent to each expert in training."""

    def take_load(self, counted_for: str) -> Tensor | None:
        """Return one of `loads`, and count anew; None if there were no tokens."""
        return self.loads.pop(counted_for, None)

    def pack(self) -> None:
        """Make the weights of experts neighbours in memory (parallel/tensor/grouped.py). Their values are lost."""
        for same in zip(*(mlp.parameters() for mlp in self._mlps())):
            pack(same)

    def forward(self, x: Tensor, batch: MicroBatch, terms: list[Term]) -> Tensor:
        """[B, s, D] -> [B, s, D]. Adds the terms of the loss that the config asks for to `terms`, in training."""
        whole = copy_to_tp_region(x, self.tp)  # [B, S, D]
        choices: Sequence[Choice] | None = (batch.chosen_experts or {}).get(self.name)
        texts = context_parts(self.tp, whole)
        before = [None for _ in texts] if choices is None else [choice.experts for choice in choices]
        parts = [self._parts(*numbered, chosen) for numbered, chosen in zip(enumerate(texts), before)]
        routings = [of_text[0].routing for of_text in parts]  # those of all tensor shards are equal
        if choices is None:
            choices = [self._choice(routing.chosen) for routing in routings]
            if self.training:  # recomputation takes a choice that has been counted
                self._count(choices, batch)
        if batch.chosen_experts is not None:
            batch.chosen_experts[self.name] = choices
        if self.training:
            terms += router_terms(self.objective, self.tp, batch, routings)
        outputs = [
            tree_sum([self._output(part, choice, batch) for part in of_text]).view_as(text)
            for of_text, choice, text in zip(parts, choices, texts)
        ]
        return reduce_from_tp_region(join_contexts(outputs), self.tp)

    def _parts(self, context: int, text: Tensor, chosen: Tensor | None) -> list[_Part]:
        """The tensor shards of one context shard. text [B, S, D]; chosen: what has been chosen before."""
        parts = []
        for number, tokens in enumerate(spread(text, self.tp.shards)):
            shard, flat = RegionShard(self.tp, number, context), tokens.flatten(0, 1)
            routing = self.router(flat, chosen, weight=shard.shared(self.router.weight))
            parts.append(_Part(shard, flat, routing))
            chosen = routing.chosen
        return parts

    @torch.no_grad()
    def _count(self, choices: Sequence[Choice], batch: MicroBatch) -> None:
        """Add to `loads`; padding counts nowhere."""
        for (chosen, *_), part in zip(choices, context_parts(self.tp, self.tp.of_context(real_tokens(batch)))):
            real = part.reshape(-1, 1).expand_as(chosen)
            for counted_for in (OF_REPORT, *((OF_STEP,) if self.router.bias is not None else ())):
                load = self.loads.setdefault(counted_for, chosen.new_zeros(self.num_experts))
                load.scatter_add_(0, chosen.flatten(), real.flatten().to(torch.int64))

    @torch.no_grad()
    def _choice(self, chosen: Tensor) -> Choice:
        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        return Choice(chosen, order, order.argsort(), route_of(experts[order], self.num_experts, self.tp))

    def _output(self, part: _Part, choice: Choice, batch: MicroBatch) -> Tensor:
        """[T, D]: what the columns of one shard give."""
        y = self._routed(part, choice)
        if self.shared is not None:
            y = y + self._shared(self.shared, part, batch)
        return y if self.tp.exact is None else contiguous_gradient(y)  # a sum's order follows the strides

    def _routed(self, part: _Part, choice: Choice) -> Tensor:
        """[T, D]: the shard's part of the weighted sum. An expert without tokens computes on none, so that its weights
        have a gradient all the same: 0."""
        per_token, order, places, route = choice.experts.shape[1], choice.order, choice.places, choice.route
        sent: Tensor = _Sent.apply(part.tokens, order, places, per_token)  # type: ignore[no-untyped-call] # torch types no apply
        mlps = self._mlps()

        def product(sender: int, rows: Tensor, groups: Groups) -> Tensor:
            return self._products(replace(part.shard, sender=sender), mlps, rows, groups)

        outputs = route.bring_back(route.by_groups(product, route.send(sent)))
        returned: Tensor = Permuted.apply(outputs, places, order)  # type: ignore[no-untyped-call] # torch types no apply
        weights = part.routing.weights.to(outputs.dtype).unsqueeze(1)  # [T, 1, K]
        return torch.bmm(weights, returned.unflatten(0, (-1, per_token))).squeeze(1)

    @staticmethod
    def _products(shard: RegionShard, mlps: Sequence[MLP], x: Tensor, groups: Groups) -> Tensor:
        """[M, D] -> [M, D]: what the shard's columns of each MLP make of its rows."""
        one = mlps[0]
        function = one.function if shard.tp.exact is None else partial(of_whole_vectors, one.function)
        wide = grouped_linear(shard, groups, list(zip(*(mlp.widenings() for mlp in mlps))), x)
        inputs, activation = (wide, function) if one.recompute else ((function(*wide),), None)
        return grouped_linear(shard, groups, [[mlp.down for mlp in mlps]], *inputs, activation=activation)[0]

    def _shared(self, mlp: MLP, part: _Part, batch: MicroBatch) -> Tensor:
        """[T, D]: what the shard's columns of the shared expert give, and nothing is sent. In an exact run it is a
        group of all tokens."""
        tokens = part.tokens
        if self.tp.exact is None:
            alone = replace(self.tp, axis=SINGLE, sequence_parallel=False)  # with the same deferred gradients
            down, inputs, activation = mlp.narrowing(column_parallel(alone, tokens, mlp.widenings()), batch)
            y = down.product(alone, inputs, activation)
        else:
            y = self._products(part.shard, [mlp], tokens, Groups.of_all(tokens))
        if self.shared_gate is None:
            return y
        return y * F.linear(tokens, part.shard.shared(self.shared_gate.weight)).sigmoid()

    def _mlps(self) -> list[MLP]:
        return [mlp for mlp in self.experts.values() if isinstance(mlp, MLP)]


def experts_flops(config: Config, seq: int) -> float:
    """Forward FLOPs of what the tokens of a sample use: router, their experts and the sum of these, shared expert."""
    m = config.model
    router = 2.0 * seq * m.hidden * (m.experts or 0)
    routed = m.experts_per_token * (mlp_flops(config, seq, m.width_of_expert()) + 2.0 * seq * m.hidden)
    shared = mlp_flops(config, seq, m.shared_expert_ffn) if m.shared_expert_ffn else 0.0
    return router + routed + shared + (2.0 * seq * m.hidden if m.shared_expert_gate else 0.0)
