"""Output over the vocabulary, for every head that predicts tokens: projection, loss, and logits on request.

    hidden [B, S, D], inside the region --VocabHead--> Term | logits | log-probabilities of the targets

The vocabulary is sharded over tensor ranks; logits are gathered only if requested. B sequences, S positions, D width, V
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.embed import TOKENS
from roots_dist.learning.models.init_stds import embedding_std, projection_std
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.cross_entropy import linear_cross_entropy, logits, target_scores
from roots_dist.parallel.tensor.exact import context_parts
from roots_dist.world.batch import IGNORE, MicroBatch, Term, added, find_scored
from roots_dist.world.sharding import ShardSpec, declare

LEAST_CHUNK, MOST_BYTES = 1024, 2**31


def loss_chunk(config: Config, tp: TensorParallel, weight: Tensor) -> int:
    """Tokens whose logits exist at one time. weight: the projection [v, D].

    The weight's gradient, float32 [v, D], is read and written once for each chunk: logits of D tokens take no more
    memory than it does, and are touched more often. In an exact run v is that of a tensor shard, so that no layout
    changes the number.
    """
    rows, width = weight.shape[0] // tp.shards, weight.shape[1]
    return config.advanced.loss_chunk or max(LEAST_CHUNK, min(width, MOST_BYTES // (4 * rows)))


class VocabHead:
    """name: name of the term. The weight is a parameter of the head that asks for it, where its spec is declared."""

    def __init__(self, config: Config, tp: TensorParallel, name: str, *, sparse: bool = False):
        """sparse: most positions are not scored, and are dropped before the projection."""
        self.config, self.tp, self.name, self.sparse = config, tp, name, sparse

    def weight(self, head: nn.Module, shared: nn.Parameter | None, width: int | None = None) -> nn.Parameter:
        """The projection [v, D]: if tied, `shared` (the embedding, if this rank holds it) or a copy of it; otherwise
        its own."""
        m = self.config.model
        if m.tied_embeddings and shared is not None:
            return shared
        shape = (self.config.padded_vocab(), width or m.hidden)
        std = embedding_std(self.config) if m.tied_embeddings else projection_std(self.config)
        spec = ShardSpec(shape=shape, shard_dim=0, std=std, copy_of=TOKENS if m.tied_embeddings else None)
        return declare(head, "weight", spec, self.tp.axis)

    def bias(self, head: nn.Module) -> nn.Parameter:
        """[v], initially zero."""
        return declare(head, "bias", ShardSpec(shape=(self.config.padded_vocab(),), shard_dim=0), self.tp.axis)

    def __call__(
        self, x: Tensor, weight: Tensor, batch: MicroBatch, training: bool, bias: Tensor | None = None
    ) -> Term | Tensor | tuple[Tensor, Tensor]:
        """The term, for x [B, S, D] inside the region: S are the positions of this context rank.

        If batch.logits_at is a position or a slice, return float32 logits [B, V] or [B, S', V] on every tensor rank; if
        it is "targets", the log-probability of each target (0 where there is none) and whether it is the most likely
        token, [B, S] each.
        """
        m, vocab, softcap = self.config.model, self.config.model.vocab, self.config.model.logit_softcap
        x = x if m.logits_scaling == 1 else x / m.logits_scaling  # linear, and x is narrower than its logits
        if batch.logits_at == "targets":
            scored = self.tp.of_context(present(batch.targets))
            scores = target_scores(
                self.tp, x.flatten(0, 1), weight, scored.flatten(), vocab=vocab, bias=bias,
                softcap=softcap, chunk=loss_chunk(self.config, self.tp, weight),
            )  # fmt: skip
            score, best = (part.view_as(scored) for part in scores)
            return score, best
        if batch.logits_at is not None:
            return logits(self.tp, x[:, batch.logits_at], weight, vocab, bias, softcap)
        if batch.references is not None:
            return self._preference(x, weight, batch, training, bias)
        targets = self.tp.of_context(present(batch.targets))
        parts = zip(context_parts(self.tp, x), context_parts(self.tp, targets))
        terms = [self._scored(*part, weight, batch, training, bias, number) for number, part in enumerate(parts)]
        return terms[0] if len(terms) == 1 else added(terms)

    def _scored(
        self,
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        batch: MicroBatch,
        training: bool,
        bias: Tensor | None,
        context: int,
    ) -> Term:
        """The term of one of this rank's context shards. x [B, S, D], targets [B, S]."""
        m, objective = self.config.model, self.config.objective
        vocab, softcap = m.vocab, m.logit_softcap
        targets, flat = targets.flatten(), x.flatten(0, 1)
        count = (targets != IGNORE).sum()
        if self.sparse or batch.scored_positions is not None:
            known = batch.scored_positions if self.tp.contexts == 1 else None
            some = find_scored(targets) if known is None else known
            targets, flat = targets.index_select(0, some), flat.index_select(0, some)
        total, hits = linear_cross_entropy(
            self.tp,
            flat,
            weight,
            targets,
            vocab=vocab,
            bias=bias,
            softcap=softcap,
            smoothing=objective.label_smoothing if training else 0.0,
            z_loss=objective.z_loss if training else 0.0,
            chunk=loss_chunk(self.config, self.tp, weight),
            context=context,
        )
        return Term(self.name, total, count, hits)

    def _preference(self, x: Tensor, weight: Tensor, batch: MicroBatch, training: bool, bias: Tensor | None) -> Term:
        """DPO of the pairs in x [B, S, D], documents 0 (chosen) and 1 (rejected) of each sample.

        The loss is a function of the log-probabilities of whole answers: they are computed first, and with them the
        weight that the gradient gives to each token's -log p, by which the second pass multiplies.
        """
        m, objective, tp = self.config.model, self.config.objective, self.tp
        targets, documents = tp.of_context(present(batch.targets)), tp.of_context(present(batch.document_ids))
        flat, chunk = x.flatten(0, 1), loss_chunk(self.config, self.tp, weight)
        scores, _ = target_scores(
            self.tp, flat, weight, targets.flatten(), vocab=m.vocab, bias=bias, softcap=m.logit_softcap, chunk=chunk
        )
        gained = tp.cp.sum_(answer_scores(scores.view_as(targets), documents))  # [B, 2]
        gained -= present(batch.references).to(scores.dtype)
        margin = objective.dpo_beta * (gained[:, 0] - gained[:, 1])
        smoothing = objective.label_smoothing if training else 0.0
        pairs = (present(batch.targets) != IGNORE).any(1)
        pairs &= tp.cp.rank == 0  # every context rank knows the loss of a pair, and one counts it
        losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        total = losses.masked_fill(~pairs, 0).sum()
        if torch.is_grad_enabled():
            slope = objective.dpo_beta * ((1 - smoothing) * torch.sigmoid(-margin) - smoothing * torch.sigmoid(margin))
            sign = torch.where(documents == 0, 1, -1)  # the chosen answer is to become more likely
            weighted, _ = linear_cross_entropy(
                self.tp, flat, weight, targets.flatten(), vocab=m.vocab, bias=bias, softcap=m.logit_softcap,
                chunk=chunk, token_weights=(slope.unsqueeze(1) * sign).flatten(),
            )  # fmt: skip
            total = total + (weighted - weighted.detach())
        return Term(self.name, total, pairs.sum(), ((margin > 0) & pairs).sum())


def answer_scores(scores: Tensor, document_ids: Tensor) -> Tensor:
    """[B, S] log-probabilities of targets, and their documents -> [B, 2]: sums over documents 0 and 1."""
    documents = document_ids.unsqueeze(-1) == torch.arange(2, device=scores.device)  # [B, S, 2]
    return (scores.unsqueeze(-1) * documents).sum(1)
