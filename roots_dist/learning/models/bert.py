"""The encoder (BERT, RoBERTa) as a tuple of named pieces: embed, blocks.0 …, head. Attention is bidirectional.

    tokens --Embed--> hidden --Block × L--> hidden --MaskedTokensHead--> terms: masked tokens, of pairs also the order

B sequences, S positions, D model width, E width of the embedding, V vocabulary (padded); s = S/tp under sequence
parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.activations import POOLER_FUNCTIONS, activation
from roots_dist.learning.models.block import Block, block_flops
from roots_dist.learning.models.embed import TOKENS, Embed, EmbeddingProjection, embed_of
from roots_dist.learning.models.gpt import make_positions
from roots_dist.learning.models.heads import Dense, at_positions, class_term, task_flops, task_head
from roots_dist.learning.models.norms import Norm
from roots_dist.learning.models.pieces import Built, PieceSpec, hidden_spec
from roots_dist.learning.models.vocab_head import VocabHead
from roots_dist.parallel.tensor.by_positions import by_positions
from roots_dist.parallel.tensor.collectives import TensorParallel, copy_to_tp_region
from roots_dist.world.batch import MicroBatch, PieceOutput, Term


class MaskedLMHead(nn.Module):
    """Masked language modeling head: a dense layer, activation and norm, then the embedding as output projection, with
    a bias.

    width: width of the stack below.
    """

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None, width: int):
        super().__init__()
        m = config.model
        inner = m.width_of_embedding()
        self.tp, self.activation = tp, activation(config, "gelu" if m.gated() else None)
        self.dense = Dense(tp, width, inner, m.std())
        self.norm = Norm(config, tp, inner)
        self.vocab_head = VocabHead(config, tp, "mlm", sparse=True)
        self.weight = self.vocab_head.weight(self, embed.tokens.weight if embed else None, inner)
        self.bias = self.vocab_head.bias(self)

    def transform(self, x: Tensor) -> Tensor:
        """[B, s, D] -> [B, S, E], inside the tensor-parallel region."""
        return copy_to_tp_region(self.norm(by_positions(self.tp, self.activation, self.dense(x))), self.tp)

    def score(self, x: Tensor, batch: MicroBatch) -> Term | Tensor | tuple[Tensor, Tensor]:
        """Masked language modeling term, or what batch.logits_at asks for."""
        return self.vocab_head(self.transform(x), self.weight, batch, self.training, self.bias)


class MaskedTokensHead(MaskedLMHead):
    """Masked language modeling head; with next-sentence prediction also a pooler over the first position and a
    classifier."""

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None):
        m = config.model
        super().__init__(config, tp, embed, m.hidden)
        self.final = Norm(config, tp) if m.ends_with_norm() else None
        pairs = objective_of(config).pairs
        self.pooler = Dense(tp, m.hidden, m.hidden, m.std(), whole=True) if pairs else None
        self.pooled = POOLER_FUNCTIONS[m.pooler_activation]
        self.next = Dense(tp, m.hidden, 2, m.std(), whole=True) if pairs else None

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = payload["hidden"]  # [B, s, D]
        x = x if self.final is None else self.final(x)
        masked_lm = self.score(x, batch)
        if self.next is None or self.pooler is None or batch.logits_at is not None:
            return PieceOutput((masked_lm,))
        beginnings = torch.zeros_like(batch.sample_ids)
        first, labels = at_positions(self.tp, x, beginnings, present(batch.labels))  # [B, D]
        logits = self.next(self.pooled(self.pooler(first)))
        return PieceOutput((masked_lm, class_term("nsp", logits, present(labels))))


def encoder_pieces(config: Config, tp: TensorParallel, blocks: str = "blocks") -> tuple[PieceSpec, ...]:
    """Pieces of the stack: the blocks, preceded by a projection if the embedding has another width."""
    m, seq = config.model, config.data.seq_length
    positions, out = make_positions(config, tp), hidden_spec(config, tp, m.hidden)

    def block(name: str) -> PieceSpec:
        def build(built: Built) -> Block:
            return Block(config, tp, name, positions, causal=False)

        return PieceSpec(name, build, block_flops(config, seq, causal=False), out, is_block=True, kind=blocks)

    project = PieceSpec(
        blocks.replace("blocks", "project"),
        lambda built: EmbeddingProjection(config, tp),
        2.0 * seq * m.width_of_embedding() * m.hidden,
        out,
    )
    needed = (project,) if m.width_of_embedding() != m.hidden else ()
    return *needed, *(block(f"{blocks}.{i}") for i in range(m.layers))


def mlm_head_flops(config: Config, width: int) -> float:
    """Forward FLOPs of a masked language modeling head on one sample."""
    inner, seq = config.model.width_of_embedding(), config.data.seq_length
    return 2.0 * seq * width * inner + 2.0 * seq * config.objective.mask_probability * inner * config.model.vocab


def pieces(config: Config, tp: TensorParallel) -> tuple[PieceSpec, ...]:
    """Pieces of the whole model, in order."""
    m = config.model
    task = objective_of(config).has_labels
    tied = (TOKENS,) if m.tied_embeddings and not task else ()
    embedded = hidden_spec(config, tp, m.width_of_embedding())
    if task:
        head = PieceSpec("head", lambda built: task_head(config, tp), task_flops(config))
        return PieceSpec("embed", lambda built: Embed(config, tp), 0.0, embedded), *encoder_pieces(config, tp), head
    return (
        PieceSpec("embed", lambda built: Embed(config, tp), 0.0, embedded, shared_params=tied),
        *encoder_pieces(config, tp),
        PieceSpec(
            "head",
            lambda built: MaskedTokensHead(config, tp, embed_of(built)),
            mlm_head_flops(config, m.hidden),
            shared_params=tied,
        ),
    )
