"""ELECTRA (Clark et al. 2020): a small generator fills in hidden tokens, the model says of each token whether it stood
there.

    tokens --Embed--> generator.blocks --generator.head--> term "mlm", and the text with its draws in it
           --discriminator.embed--> blocks --head--> term "rtd"

One pipeline: the second stack begins where the first ends, on any stage. Both read the same embedding (section 3.2); no
gradient goes through the draws. B sequences, S positions, D model width, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.accounting.sizes import generator_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models import bert
from roots_dist.learning.models.bert import MaskedWords, encoder, words_flops
from roots_dist.learning.models.embed import Embed, Embeddings, embed_of
from roots_dist.learning.models.heads import TASKS, Dense
from roots_dist.learning.models.norms import Dropout
from roots_dist.learning.models.pieces import Built, PayloadSpec, PieceSpec, hidden_of
from roots_dist.learning.models.sample_tokens import draw
from roots_dist.parallel.tensor.collectives import TensorParallel, gather_sequence
from roots_dist.world import rng
from roots_dist.world.batch import IGNORE, MicroBatch, PieceOutput, Term


class GeneratorHead(MaskedWords):
    """Scores the guesses of hidden words, and draws from them what the discriminator will read."""

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None):
        """config: the generator's."""
        super().__init__(config, tp, embed, config.model.hidden)
        self.seed, self.vocab, self.chunk = config.train.seed, config.model.vocab, config.advanced.loss_chunk

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = self.entered(payload["hidden"])  # [B, S, E]
        term = self.words(x, self.weight, batch, self.training, self.bias)
        return PieceOutput((term,), {"tokens": self._filled_in(x, batch)})

    @torch.no_grad()
    def _filled_in(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """int64 [B, S]: the text as it is shown, with a drawn word at each hidden place."""
        samples = rng.fold(rng.key("generator", self.seed, batch.step), batch.samples)  # [B]
        rows = rng.fold(samples.unsqueeze(1), torch.arange(x.shape[1], device=x.device))  # [B, S]
        where = present(batch.targets) != IGNORE
        drawn = draw(self.tp, x[where], self.weight, self.bias, rows[where], vocab=self.vocab, chunk=self.chunk)
        return batch.tokens.masked_scatter(where, drawn)


class DiscriminatorEmbed(nn.Module):
    """The same vectors, of the text with the draws in it."""

    def __init__(self, config: Config, tp: TensorParallel, embed: Embeddings | None, words: nn.Parameter | None):
        super().__init__()
        self.vectors = embed or Embeddings(config, tp, "embed", words)
        self.dropout = Dropout(config, tp, "discriminator.embed")

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> dict[str, Tensor]:
        x = self.vectors.embedded(payload["tokens"], batch)
        return payload | {"hidden": self.dropout(x, batch)}


class Head(nn.Module):
    """Of each position: was this token put there? A layer, its activation, one number."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__()
        m = config.model
        self.tp = tp
        self.dense = Dense(tp, m.hidden, m.hidden, m.std())
        self.score = Dense(tp, m.hidden, 1, m.std())

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = self.score(F.gelu(self.dense(payload["hidden"])))  # [B, s, 1]
        logits = gather_sequence(x, self.tp).squeeze(-1)  # [B, S]
        if batch.read is not None:
            assert batch.read != "targets", "a discriminator has no probabilities of words"
            return PieceOutput((logits[:, batch.read].float(),))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        originals = present(batch.originals)
        scored = originals != IGNORE
        replaced = payload["tokens"] != originals
        losses = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="none")
        hits = ((logits > 0) == replaced) & scored
        return PieceOutput((Term("rtd", losses.masked_fill(~scored, 0).sum(), scored.sum(), hits.sum()),))


def _with_tokens(out: Callable[[MicroBatch], PayloadSpec]) -> Callable[[MicroBatch], PayloadSpec]:
    def both(batch: MicroBatch) -> PayloadSpec:
        return out(batch) | {"tokens": (tuple(batch.tokens.shape), torch.int64)}

    return both


def shared_names(config: Config) -> tuple[str, ...]:
    """Every parameter of the embedding."""
    m = config.model
    names = ["tokens.weight"]
    names += ["position_embedding"] if m.positions == "learned" else []
    names += ["segment_embedding"] if m.segments else []
    names += ["norm.weight", "norm.bias"][: 2 if m.norm == "layernorm" else 1] if m.embedding_norm else []
    return tuple(f"embed.{name}" for name in names)


def pieces(config: Config, tp: TensorParallel) -> tuple[PieceSpec, ...]:
    """Both stacks, in order. Fine-tuning has the discriminator alone, an encoder like BERT's."""
    if config.objective.name in TASKS:
        return bert.pieces(config, tp)
    m, generator, shared = config.model, generator_of(config), shared_names(config)
    embedded = hidden_of(config, tp, m.width_of_embedding())
    tokens = _with_tokens(lambda batch: {})

    def with_tokens(spec: PieceSpec) -> PieceSpec:
        return replace(spec, out=_with_tokens(spec.out))

    def second(built: Built) -> DiscriminatorEmbed:
        head = built.get("generator.head")  # which has a copy of the words, if this rank has not the first embedding
        words = head.weight if isinstance(head, GeneratorHead) else None
        return DiscriminatorEmbed(config, tp, embed_of(built), words)

    def generator_head(built: Built) -> GeneratorHead:
        return GeneratorHead(generator, tp, embed_of(built))

    return (
        PieceSpec("embed", lambda built: Embed(config, tp), 0.0, embedded, shares=shared),
        *encoder(generator, tp, "generator.blocks"),
        PieceSpec(
            "generator.head", generator_head, words_flops(config, generator.model.hidden), tokens, shares=shared[:1]
        ),
        PieceSpec("discriminator.embed", second, 0.0, _with_tokens(embedded), shares=shared),
        *map(with_tokens, encoder(config, tp)),
        PieceSpec("head", lambda built: Head(config, tp), 2.0 * config.data.seq_length * m.hidden * (m.hidden + 1)),
    )
