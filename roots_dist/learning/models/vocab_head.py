"""The output side over the vocabulary, which all heads that say words share: the projection, the loss, and what is
read.

    hidden [B, S, D], entered --Words--> Term | logits | log-probabilities of the targets

Words are cut over tensor ranks; their logits are gathered only to be read. B sequences, S positions, D width, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.embed import TOKENS
from roots_dist.learning.models.init_stds import embedding_std, projection_std
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.cross_entropy import linear_cross_entropy, logits, target_scores
from roots_dist.world.batch import IGNORE, MicroBatch, Term
from roots_dist.world.sharding import ShardSpec, declare


class VocabHead:
    """name: of the term. The weight belongs to the head that asks for it: its spec is written there."""

    def __init__(self, config: Config, tp: TensorParallel, name: str, *, sparse: bool = False):
        """sparse: most positions are not scored, and are left out before the projection."""
        self.config, self.tp, self.name, self.sparse = config, tp, name, sparse

    def weight(self, head: nn.Module, there: nn.Parameter | None, width: int | None = None) -> nn.Parameter:
        """The projection [v, D]: `there` (the embedding, where this rank holds it), or a copy of it; untied, its
        own."""
        m = self.config.model
        if m.tied_embeddings and there is not None:
            return there
        shape = (self.config.padded_vocab(), width or m.hidden)
        std = embedding_std(self.config) if m.tied_embeddings else projection_std(self.config)
        spec = ShardSpec(shape=shape, cut=0, std=std, copy_of=TOKENS if m.tied_embeddings else None)
        return declare(head, "weight", spec, self.tp.axis)

    def bias(self, head: nn.Module) -> nn.Parameter:
        """[v], zero at first."""
        return declare(head, "bias", ShardSpec(shape=(self.config.padded_vocab(),), cut=0), self.tp.axis)

    def __call__(
        self, x: Tensor, weight: Tensor, batch: MicroBatch, learning: bool, bias: Tensor | None = None
    ) -> Term | Tensor | tuple[Tensor, Tensor]:
        """x [B, S, D] has entered the region. Without batch.read the term; for a position or several, float32 logits
        [B, V] or [B, S', V] on every tensor rank; for "targets", of each its log-probability (0 where there is none)
        and whether it is the likeliest word: [B, S] each."""
        vocab, objective = self.config.model.vocab, self.config.objective
        if batch.read == "targets":
            found = target_scores(
                self.tp, x.flatten(0, 1), weight, present(batch.targets).flatten(), vocab=vocab, bias=bias,
                chunk=self.config.advanced.loss_chunk,
            )  # fmt: skip
            score, best = (part.view_as(present(batch.targets)) for part in found)
            return score, best
        if batch.read is not None:
            return logits(self.tp, x[:, batch.read], weight, vocab, bias)
        targets, flat = present(batch.targets).flatten(), x.flatten(0, 1)
        count = (targets != IGNORE).sum()
        if self.sparse:
            some = torch.nonzero(targets != IGNORE).squeeze(1)
            targets, flat = targets[some], flat[some]
        total, hits = linear_cross_entropy(
            self.tp,
            flat,
            weight,
            targets,
            vocab=vocab,
            bias=bias,
            smoothing=objective.label_smoothing if learning else 0.0,
            z_loss=objective.z_loss if learning else 0.0,
            chunk=self.config.advanced.loss_chunk,
        )
        return Term(self.name, total, count, hits)
