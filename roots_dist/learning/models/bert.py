"""The encoder (BERT, RoBERTa) as a tuple of named pieces: embed, blocks.0 …, head. Every position sees every other.

    tokens --Embed--> hidden --Block × L--> hidden --Head--> terms: masked words, and with pairs: does B follow A

B sequences, S positions, D model width, E width of the embedding, V vocabulary (padded); s = S/tp under sequence
parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.block import ACTIVATIONS, Block, block_flops
from roots_dist.learning.models.embed import TOKENS, Embed, EmbeddingProjection, embed_of
from roots_dist.learning.models.gpt import positions_of
from roots_dist.learning.models.heads import TASKS, Dense, classes, task_flops, task_head
from roots_dist.learning.models.norms import Norm
from roots_dist.learning.models.pieces import Built, PieceSpec, hidden_of
from roots_dist.learning.models.vocab_head import VocabHead
from roots_dist.parallel.tensor.collectives import TensorParallel, copy_to_tp_region, gather_sequence
from roots_dist.world.batch import MicroBatch, PieceOutput, Term


class MaskedWords(nn.Module):
    """A masked word's guess: a layer, its activation, a norm, then the embedding as projection, and a bias for each
    word.

    width: of the stack below.
    """

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None, width: int):
        super().__init__()
        m = config.model
        inner = m.width_of_embedding()
        self.tp, self.activation = tp, ACTIVATIONS["gelu" if m.gated() else m.activation]
        self.dense = Dense(tp, width, inner, m.std())
        self.norm = Norm(config, tp, inner)
        self.words = VocabHead(config, tp, "mlm", sparse=True)
        self.weight = self.words.weight(self, embed.tokens.weight if embed else None, inner)
        self.bias = self.words.bias(self)

    def entered(self, x: Tensor) -> Tensor:
        """[B, s, D] -> [B, S, E], in the region of words."""
        return copy_to_tp_region(self.norm(self.activation(self.dense(x))), self.tp)

    def score(self, x: Tensor, batch: MicroBatch) -> Term | Tensor | tuple[Tensor, Tensor]:
        return self.words(self.entered(x), self.weight, batch, self.training, self.bias)


class Head(MaskedWords):
    """Masked words; and with next-sentence prediction a pooler over the first position and its two classes."""

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None):
        m = config.model
        super().__init__(config, tp, embed, m.hidden)
        self.final = Norm(config, tp) if m.norm_position == "pre" else None
        pairs = config.objective.name == "mlm-nsp"
        self.pooler = Dense(tp, m.hidden, m.hidden, m.std(), whole=True) if pairs else None
        self.next = Dense(tp, m.hidden, 2, m.std(), whole=True) if pairs else None

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = payload["hidden"]  # [B, s, D]
        x = x if self.final is None else self.final(x)
        found = self.score(x, batch)
        if self.next is None or self.pooler is None or batch.read is not None:
            return PieceOutput((found,))
        first = gather_sequence(x, self.tp)[:, 0]  # [B, D]
        logits = self.next(torch.tanh(self.pooler(first)))
        return PieceOutput((found, classes("nsp", logits, present(batch.labels))))


def encoder(config: Config, tp: TensorParallel, blocks: str = "blocks") -> tuple[PieceSpec, ...]:
    """The stack: a projection where the embedding has another width, and the blocks."""
    m, seq = config.model, config.data.seq_length
    positions, out = positions_of(config, tp), hidden_of(config, tp, m.hidden)

    def block(name: str) -> PieceSpec:
        def build(built: Built) -> Block:
            return Block(config, tp, name, positions, causal=False)

        return PieceSpec(name, build, block_flops(config, seq, causal=False), out, is_block=True)

    project = PieceSpec(
        blocks.replace("blocks", "project"),
        lambda built: EmbeddingProjection(config, tp),
        2.0 * seq * m.width_of_embedding() * m.hidden,
        out,
    )
    needed = (project,) if m.width_of_embedding() != m.hidden else ()
    return *needed, *(block(f"{blocks}.{i}") for i in range(m.layers))


def words_flops(config: Config, width: int) -> float:
    """Of a head over masked words, on a sample."""
    inner, seq = config.model.width_of_embedding(), config.data.seq_length
    return 2.0 * seq * width * inner + 2.0 * seq * config.objective.mask_probability * inner * config.padded_vocab()


def pieces(config: Config, tp: TensorParallel) -> tuple[PieceSpec, ...]:
    """The whole model, in order."""
    m = config.model
    task = config.objective.name in TASKS
    tied = (TOKENS,) if m.tied_embeddings and not task else ()
    embedded = hidden_of(config, tp, m.width_of_embedding())
    if task:
        head = PieceSpec("head", lambda built: task_head(config, tp), task_flops(config))
        return PieceSpec("embed", lambda built: Embed(config, tp), 0.0, embedded), *encoder(config, tp), head
    return (
        PieceSpec("embed", lambda built: Embed(config, tp), 0.0, embedded, shares=tied),
        *encoder(config, tp),
        PieceSpec(
            "head",
            lambda built: Head(config, tp, embed_of(built)),
            words_flops(config, m.hidden),
            shares=tied,
        ),
    )
