"""ELECTRA (Clark et al. 2020): a generator fills in masked tokens, and a discriminator detects which tokens were
replaced.

    tokens --Embed--> generator.blocks --generator.head--> term "mlm", and the text with sampled tokens
           --discriminator.embed--> blocks --head--> term "rtd"

Both stacks form one pipeline; the second may begin on any stage. They share the embedding (section 3.2), and no
gradient flows through the sampled tokens. B sequences, S positions, D model width, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.accounting.sizes import generator_of
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models import bert
from roots_dist.learning.models.bert import MaskedLMHead, encoder_pieces, mlm_head_flops
from roots_dist.learning.models.embed import Embed, Embeddings, embed_of
from roots_dist.learning.models.heads import Dense
from roots_dist.learning.models.norms import Dropout
from roots_dist.learning.models.pieces import Built, PayloadSpec, PieceSpec, hidden_spec
from roots_dist.learning.models.sample_tokens import sample_tokens
from roots_dist.learning.models.vocab_head import loss_chunk
from roots_dist.parallel.tensor.by_positions import by_positions
from roots_dist.parallel.tensor.collectives import TensorParallel, gather_sequence
from roots_dist.parallel.tensor.exact import context_parts, join_contexts
from roots_dist.world import rng
from roots_dist.world.batch import IGNORE, MicroBatch, PieceOutput, Term, added, find_scored


class GeneratorHead(MaskedLMHead):
    """Scores predictions of masked tokens, and samples from them the tokens that the discriminator reads."""

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None):
        """config: the generator's config."""
        super().__init__(config, tp, embed, config.model.hidden)
        self.seed, self.vocab, self.chunk = config.train.seed, config.model.vocab, loss_chunk(config, tp, self.weight)

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = self.transform(payload["hidden"])  # [B, S, E]
        term = self.vocab_head(x, self.weight, batch, self.training, self.bias)
        return PieceOutput((term,), {"tokens": self._sample_replacements(x, batch)})

    @torch.no_grad()
    def _sample_replacements(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """int64 [B, L]: the masked text of this context rank, with a sampled token at each masked position."""
        samples = rng.fold(rng.key("generator", self.seed, batch.step), batch.sample_ids)  # [B]
        rows = rng.fold(samples.unsqueeze(1), self.tp.in_region(x.shape[1]).places(x.device))  # [B, L]
        tokens, targets = self.tp.of_context(batch.tokens), self.tp.of_context(present(batch.targets))
        parts = zip(*(context_parts(self.tp, of_all) for of_all in (x, rows, tokens, targets)))
        known = batch.scored_positions if self.tp.contexts == 1 else None
        return join_contexts([self._replaced(known, *part) for part in parts])

    def _replaced(self, known: Tensor | None, x: Tensor, rows: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """The same of one context shard. known: where targets are scored, if it is known."""
        masked = find_scored(targets) if known is None else known
        hidden, rows = x.flatten(0, 1).index_select(0, masked), rows.flatten().index_select(0, masked)
        drawn = sample_tokens(self.tp, hidden, self.weight, self.bias, rows, vocab=self.vocab, chunk=self.chunk)
        return tokens.flatten().scatter(0, masked, drawn).view_as(tokens)


class DiscriminatorEmbed(nn.Module):
    """The same embedding, applied to the text with sampled tokens."""

    def __init__(
        self, config: Config, tp: TensorParallel, embed: Embeddings | None, shared_tokens: nn.Parameter | None
    ):
        super().__init__()
        self.vectors = embed or Embeddings(config, tp, "embed", shared_tokens)
        self.dropout = Dropout(config, tp, "discriminator.embed")

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> dict[str, Tensor]:
        x = self.vectors.embedded(payload["tokens"], batch)
        return payload | {"hidden": self.dropout(x, batch)}


class ReplacedTokensHead(nn.Module):
    """Replaced-token detection at each position: a dense layer, its activation, one logit."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__()
        m = config.model
        self.tp = tp
        self.dense = Dense(tp, m.hidden, m.hidden, m.std())
        self.score = Dense(tp, m.hidden, 1, m.std())

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = self.score(by_positions(self.tp, F.gelu, self.dense(payload["hidden"])))  # [B, s, 1]
        logits = gather_sequence(x, self.tp).squeeze(-1)  # [B, L]
        if batch.logits_at is not None:
            assert batch.logits_at != "targets", "a discriminator has no probabilities of words"
            return PieceOutput((logits[:, batch.logits_at].float(),))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        originals = self.tp.of_context(present(batch.originals))
        scored = originals != IGNORE
        replaced = payload["tokens"] != originals
        parts = zip(*(context_parts(self.tp, of_all) for of_all in (logits, replaced, scored)))
        terms = [self._term(*part) for part in parts]
        return PieceOutput((terms[0] if len(terms) == 1 else added(terms),))

    def _term(self, logits: Tensor, replaced: Tensor, scored: Tensor) -> Term:
        losses = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="none")
        hits = ((logits > 0) == replaced) & scored
        return Term("rtd", losses.masked_fill(~scored, 0).sum(), scored.sum(), hits.sum())


def _with_tokens(tp: TensorParallel, out: Callable[[MicroBatch], PayloadSpec]) -> Callable[[MicroBatch], PayloadSpec]:
    def both(batch: MicroBatch) -> PayloadSpec:
        size, seq = batch.tokens.shape
        return out(batch) | {"tokens": ((size, seq // tp.cp.size), torch.int64)}

    return both


def shared_names(config: Config) -> tuple[str, ...]:
    """Names of all parameters of the embedding."""
    m = config.model
    names = ["tokens.weight"]
    names += ["position_embedding"] if m.positions == "learned" else []
    names += ["segment_embedding"] if m.segments else []
    names += ["norm.weight", "norm.bias"][: 2 if m.norm == "layernorm" else 1] if m.embedding_norm else []
    return tuple(f"embed.{name}" for name in names)


def pieces(config: Config, tp: TensorParallel) -> tuple[PieceSpec, ...]:
    """Pieces of both stacks, in order. Fine-tuning uses only the discriminator, an encoder like BERT."""
    if not objective_of(config).has_generator:
        return bert.pieces(config, tp)
    m, generator, shared = config.model, generator_of(config), shared_names(config)
    embedded = hidden_spec(config, tp, m.width_of_embedding())
    tokens = _with_tokens(tp, lambda batch: {})

    def with_tokens(spec: PieceSpec) -> PieceSpec:
        return replace(spec, out=_with_tokens(tp, spec.out))

    def second(built: Built) -> DiscriminatorEmbed:
        head = built.get("generator.head")  # may hold a copy of the token embedding
        shared_tokens = head.weight if isinstance(head, GeneratorHead) else None
        return DiscriminatorEmbed(config, tp, embed_of(built), shared_tokens)

    def generator_head(built: Built) -> GeneratorHead:
        return GeneratorHead(generator, tp, embed_of(built))

    return (
        PieceSpec("embed", lambda built: Embed(config, tp), 0.0, embedded, shared_params=shared),
        *encoder_pieces(generator, tp, "generator.blocks"),
        PieceSpec(
            "generator.head",
            generator_head,
            mlm_head_flops(config, generator.model.hidden),
            tokens,
            shared_params=shared[:1],
        ),
        PieceSpec("discriminator.embed", second, 0.0, _with_tokens(tp, embedded), shared_params=shared),
        *map(with_tokens, encoder_pieces(config, tp)),
        PieceSpec(
            "head",
            lambda built: ReplacedTokensHead(config, tp),
            2.0 * config.data.seq_length * m.hidden * (m.hidden + 1),
        ),
    )
