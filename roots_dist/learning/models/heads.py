"""Task heads: a class for each text, or for each token. They have few outputs, so every tensor rank computes all of
them.

    hidden [B, s, D] --Classify--> first position (bert, electra), or last non-padding one (gpt) --> term "classify"
                     --Tag-------> every position                                                --> term "tag"

Layers before the classifier are those of transformers: a pooler for bert, a dense layer with gelu for electra, none for
gpt. B sequences, S positions, D width, C classes; s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.activations import POOLER_FUNCTIONS
from roots_dist.learning.models.norms import Dropout, Norm
from roots_dist.parallel.tensor.by_positions import by_positions
from roots_dist.parallel.tensor.collectives import TensorParallel, gather_sequence
from roots_dist.parallel.tensor.exact import recorded
from roots_dist.world.batch import IGNORE, MicroBatch, PieceOutput, Term
from roots_dist.world.sharding import ShardSpec, declare


class Dense(nn.Module):
    """A linear layer that every tensor rank computes alike. whole: the input holds all positions, even under sequence
    parallelism."""

    def __init__(
        self, tp: TensorParallel, width: int, features: int, std: float, *, whole: bool = False, bias: bool = True
    ):
        super().__init__()
        self.tp, self.whole = tp, whole
        partial = tp.has_partial_gradients and not whole
        spec = ShardSpec(shape=(features, width), std=std, partial=partial)
        self.weight = declare(self, "weight", spec, tp.axis)
        self.bias = declare(self, "bias", ShardSpec(shape=(features,), partial=partial), tp.axis) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            bias = self.bias if self.bias is None else recorded(self.tp, self.bias)
            return F.linear(x, recorded(self.tp, self.weight), bias)
        return by_positions(self.tp, F.linear, x, self.weight, self.bias)


def class_term(name: str, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Term:
    """Cross-entropy over a few classes, the same on every tensor rank. logits [..., C], labels [...] or IGNORE."""
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    scored, guessed = labels != IGNORE, logits.argmax(-1)
    confusion = None if torch.is_grad_enabled() else _confusion(labels[scored], guessed[scored], logits.shape[-1])
    return Term(name, total, scored.sum(), ((guessed == labels) & scored).sum(), confusion)


def _confusion(labels: Tensor, guessed: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix, int64 [C, C]: rows are labels, columns are predictions."""
    return torch.bincount(labels * num_classes + guessed, minlength=num_classes**2).view(num_classes, num_classes)


class _Task(nn.Module):
    """The common part of both heads: the final norm of a stack that has one, dropout, and the term."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__()
        self.family, self.tp = family_of(config), tp
        self.name, self.smoothing = config.objective.name, config.objective.label_smoothing
        last = Norm(config, tp) if config.model.ends_with_norm() and self.family.last_norm else None
        self.norm = last if self.family.last_norm == "norm" else None
        self.final = last if self.family.last_norm == "final" else None
        self.drop = Dropout(config, tp, "head")

    def normed(self, x: Tensor) -> Tensor:
        last = self.norm or self.final
        return x if last is None else last(x)

    def to_output(self, logits: Tensor, labels: Tensor | None, batch: MicroBatch) -> PieceOutput:
        """The term, or float32 logits (of a model without labels, its hidden states) if batch.logits_at is set."""
        if batch.logits_at is not None:
            return PieceOutput((logits.float(),))
        smoothing = self.smoothing if self.training else 0.0
        return PieceOutput((class_term(self.name, logits, present(labels), smoothing),))


class Classify(_Task):
    """A class for each text or pair of texts."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__(config, tp)
        m = config.model
        pooling = self.family.pooling
        self.pooler = Dense(tp, m.hidden, m.hidden, m.std(), whole=True) if pooling == "pooler" else None
        self.pooled = POOLER_FUNCTIONS[m.pooler_activation]
        self.dense = Dense(tp, m.hidden, m.hidden, m.std(), whole=True) if pooling == "dense" else None
        self.again = Dropout(config, tp, "head.classifier") if pooling == "dense" else None
        self.classifier = classifier(config, tp, whole=True, bias=pooling != "last")

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        last = self.family.pooling == "last"
        read = last_positions(batch) if last else torch.zeros_like(batch.sample_ids)
        x, labels = at_positions(self.tp, self.normed(payload["hidden"]), read, batch.labels)  # [B, D]
        if self.pooler is not None:
            x = self.pooled(self.pooler(x))
        elif self.dense is not None:
            x = F.gelu(self.dense(self._dropped(self.drop, x, batch)))
        if self.classifier is None:
            return self.to_output(x, labels, batch)
        dropped = x if last else self._dropped(self.again or self.drop, x, batch)
        return self.to_output(self.classifier(dropped), labels, batch)

    def _dropped(self, dropout: Dropout, x: Tensor, batch: MicroBatch) -> Tensor:
        """Apply dropout to one position of each text, which every tensor rank holds."""
        with self.tp.without_sequence_sharding():
            dropped: Tensor = dropout(x.unsqueeze(1), batch)
        return dropped.squeeze(1)


class Tag(_Task):
    """A class for each position that has a label."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__(config, tp)
        self.classifier = classifier(config, tp)

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        if self.classifier is None:
            return self.to_output(gather_sequence(self.normed(payload["hidden"]), self.tp), None, batch)
        logits = self.classifier(self.drop(self.normed(payload["hidden"]), batch))  # [B, s, C]
        labels = None if batch.labels is None else self.tp.of_context(batch.labels)
        return self.to_output(gather_sequence(logits, self.tp), labels, batch)


def at_positions(tp: TensorParallel, x: Tensor, read: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One position of each text, for a head that reads no other: [B, s, D], int64 [B] -> [B, D], and the labels [B].

    Only the context rank that holds a text's position scores it: on the others the label is IGNORE.
    """
    whole = gather_sequence(x, tp)  # [B, L, D]
    index, held = tp.in_region(whole.shape[1]).find(read)
    scored = labels if labels is None else labels.masked_fill(~held, IGNORE)
    return whole[torch.arange(len(whole), device=x.device), index], scored


def classifier(config: Config, tp: TensorParallel, *, whole: bool = False, bias: bool = True) -> Dense | None:
    """A layer with an output for each label; None if there are no labels yet, and the model gives its hidden states."""
    m, labels = config.model, config.finetune.labels
    return Dense(tp, m.hidden, len(labels), m.std(), whole=whole, bias=bias) if labels else None


def last_positions(batch: MicroBatch) -> Tensor:
    """int64 [B]: last position of each text that is not padding."""
    if batch.document_ids is None:
        return torch.full_like(batch.sample_ids, batch.tokens.shape[1] - 1)
    places = torch.arange(batch.document_ids.shape[1], device=batch.document_ids.device)
    return torch.where(batch.document_ids >= 0, places, 0).amax(1)


def task_head(config: Config, tp: TensorParallel) -> nn.Module:
    """The head of the config's objective."""
    return (Tag if objective_of(config).answer == "tag" else Classify)(config, tp)


def task_flops(config: Config) -> float:
    """Forward FLOPs of the head on one sample."""
    m, num_classes = config.model, len(config.finetune.labels)
    if objective_of(config).answer == "tag":
        return 2.0 * config.data.seq_length * m.hidden * num_classes
    return 2.0 * m.hidden * (num_classes + (0 if family_of(config).pooling == "last" else m.hidden))
