"""Heads for a task: a class for a whole text, or for each of its words. Few outputs, so every tensor rank computes all.

    hidden [B, s, D] --Classify--> first position (bert, electra), or the last that is text (gpt) --> term "classify"
                     --Tag-------> every position                                                 --> term "tag"

Before the classifier each family has what it has in transformers: bert a pooler, electra a layer with gelu, gpt
nothing. B sequences, S positions, D width, C classes; s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.norms import Dropout, Norm
from roots_dist.parallel.tensor.collectives import TensorParallel, gather_sequence
from roots_dist.world.batch import IGNORE, MicroBatch, PieceOutput, Term
from roots_dist.world.sharding import ShardSpec, declare

TASKS = ("classify", "tag")
"""Objectives whose head is here."""


class Dense(nn.Module):
    """A layer that every tensor rank computes alike. whole: its input is, under sequence parallelism too."""

    def __init__(
        self, tp: TensorParallel, width: int, features: int, std: float, *, whole: bool = False, bias: bool = True
    ):
        super().__init__()
        partial = tp.sequence_parallel and not whole
        spec = ShardSpec(shape=(features, width), std=std, partial=partial)
        self.weight = declare(self, "weight", spec, tp.axis)
        self.bias = declare(self, "bias", ShardSpec(shape=(features,), partial=partial), tp.axis) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def classes(name: str, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Term:
    """The cross-entropy of a few classes, the same on every tensor rank. logits [..., C], labels [...] or IGNORE."""
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    scored, guessed = labels != IGNORE, logits.argmax(-1)
    table = None if torch.is_grad_enabled() else _table(labels[scored], guessed[scored], logits.shape[-1])
    return Term(name, total, scored.sum(), ((guessed == labels) & scored).sum(), table)


def _table(labels: Tensor, guessed: Tensor, classes: int) -> Tensor:
    """int64 [C, C]: how many of each (rows) were taken for each (columns)."""
    return torch.bincount(labels * classes + guessed, minlength=classes**2).view(classes, classes)


class _Task(nn.Module):
    """What both heads share: the last norm of a stack that has one, dropout, and how logits become a term."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__()
        m = config.model
        self.family, self.tp = m.family, tp
        self.name, self.smoothing = config.objective.name, config.objective.label_smoothing
        last = Norm(config, tp) if m.norm_position == "pre" and m.family != "electra" else None
        self.norm = last if m.family == "gpt" else None
        self.final = None if m.family == "gpt" else last
        self.drop = Dropout(config, tp, "head")

    def normed(self, x: Tensor) -> Tensor:
        last = self.norm or self.final
        return x if last is None else last(x)

    def found(self, logits: Tensor, batch: MicroBatch) -> PieceOutput:
        """Of batch.read the logits, float32, whatever it asks for; else the term."""
        if batch.read is not None:
            return PieceOutput((logits.float(),))
        smoothing = self.smoothing if self.training else 0.0
        return PieceOutput((classes(self.name, logits, present(batch.labels), smoothing),))


class Classify(_Task):
    """A class for each text (or pair of texts)."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__(config, tp)
        m = config.model
        bert, electra = m.family == "bert", m.family == "electra"
        self.pooler = Dense(tp, m.hidden, m.hidden, m.std(), whole=True) if bert else None
        self.dense = Dense(tp, m.hidden, m.hidden, m.std(), whole=True) if electra else None
        self.again = Dropout(config, tp, "head.classifier") if electra else None
        bias = m.family != "gpt"
        self.classifier = Dense(tp, m.hidden, len(config.finetune.labels), m.std(), whole=True, bias=bias)

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = gather_sequence(self.normed(payload["hidden"]), self.tp)  # [B, S, D]
        if self.family == "gpt":
            return self.found(self.classifier(x[torch.arange(len(x), device=x.device), last_of(batch)]), batch)
        x = x[:, 0]  # [B, D]
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        elif self.dense is not None:
            x = F.gelu(self.dense(self._dropped(self.drop, x, batch)))
        return self.found(self.classifier(self._dropped(self.again or self.drop, x, batch)), batch)

    def _dropped(self, dropout: Dropout, x: Tensor, batch: MicroBatch) -> Tensor:
        """One position of each text, which every tensor rank holds."""
        with self.tp.without_sequence_parallel():
            dropped: Tensor = dropout(x.unsqueeze(1), batch)
        return dropped.squeeze(1)


class Tag(_Task):
    """A class for each position that has a label."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__(config, tp)
        self.classifier = Dense(tp, config.model.hidden, len(config.finetune.labels), config.model.std())

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        logits = self.classifier(self.drop(self.normed(payload["hidden"]), batch))  # [B, s, C]
        return self.found(gather_sequence(logits, self.tp), batch)


def last_of(batch: MicroBatch) -> Tensor:
    """int64 [B]: the last position of each text that is not padding."""
    if batch.documents is None:
        return torch.full_like(batch.samples, batch.tokens.shape[1] - 1)
    places = torch.arange(batch.documents.shape[1], device=batch.documents.device)
    return torch.where(batch.documents >= 0, places, 0).amax(1)


def task_head(config: Config, tp: TensorParallel) -> nn.Module:
    return {"classify": Classify, "tag": Tag}[config.objective.name](config, tp)


def task_flops(config: Config) -> float:
    """Of a sample."""
    m, classes = config.model, len(config.finetune.labels)
    if config.objective.name == "tag":
        return 2.0 * config.data.seq_length * m.hidden * classes
    return 2.0 * m.hidden * (classes + (0 if m.family == "gpt" else m.hidden))
