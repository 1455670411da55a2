"""The encoder (BERT, RoBERTa) as a tuple of named pieces: embed, blocks.0 …, head. Every position sees every other.

    tokens --Embed--> hidden --Block × L--> hidden --Head--> terms: masked words, and with pairs: does B follow A

B sequences, S positions, D model width, E width of the embedding, V vocabulary (padded); s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.learning.models.block import ACTIVATIONS, Block, block_flops
from roots_dist.learning.models.embed import TOKENS, Embed, Project
from roots_dist.learning.models.gpt import positions_of
from roots_dist.learning.models.heads import TASKS, Dense, classes, task_flops, task_head
from roots_dist.learning.models.norms import Norm
from roots_dist.learning.models.pieces import Built, PieceSpec, hidden_of
from roots_dist.learning.models.words import Words
from roots_dist.parallel.tensor.collectives import Split, enter, whole
from roots_dist.world.batch import MicroBatch, Scored, Term


class MaskedWords(nn.Module):
    """A masked word's guess: a layer, its activation, a norm, then the embedding as projection, and a bias for each word.

    width: of the stack below.
    """

    def __init__(self, config: Config, split: Split, embed: nn.Module | None, width: int):
        super().__init__()
        m = config.model
        inner = m.width_of_embedding()
        self.split, self.activation = split, ACTIVATIONS["gelu" if m.gated() else m.activation]
        self.dense = Dense(split, width, inner, m.std())
        self.norm = Norm(config, split, inner)
        self.words = Words(config, split, "mlm", sparse=True)
        self.weight = self.words.weight(self, embed and embed.tokens.weight, inner)
        self.bias = self.words.bias(self)

    def entered(self, x: Tensor) -> Tensor:
        """[B, s, D] -> [B, S, E], in the region of words."""
        return enter(self.norm(self.activation(self.dense(x))), self.split)

    def score(self, x: Tensor, batch: MicroBatch) -> Term | Tensor | tuple[Tensor, Tensor]:
        return self.words(self.entered(x), self.weight, batch, self.training, self.bias)


class Head(MaskedWords):
    """Masked words; and with next-sentence prediction a pooler over the first position and its two classes."""

    def __init__(self, config: Config, split: Split, embed: nn.Module | None):
        m = config.model
        super().__init__(config, split, embed, m.hidden)
        self.final = Norm(config, split) if m.norm_position == "pre" else None
        pairs = config.objective.name == "mlm-nsp"
        self.pooler = Dense(split, m.hidden, m.hidden, m.std(), whole=True) if pairs else None
        self.next = Dense(split, m.hidden, 2, m.std(), whole=True) if pairs else None

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> Scored:
        x = payload["hidden"]  # [B, s, D]
        x = x if self.final is None else self.final(x)
        found = self.score(x, batch)
        if self.next is None or batch.read is not None:
            return Scored((found,))
        first = whole(x, self.split)[:, 0]  # [B, D]
        return Scored((found, classes("nsp", self.next(torch.tanh(self.pooler(first))), batch.labels)))


def encoder(config: Config, split: Split, blocks: str = "blocks") -> tuple[PieceSpec, ...]:
    """The stack: a projection where the embedding has another width, and the blocks."""
    m, seq = config.model, config.data.seq
    positions, out = positions_of(config, split), hidden_of(config, split, m.hidden)

    def block(name: str) -> PieceSpec:
        def build(built: Built) -> Block:
            return Block(config, split, name, positions, causal=False)

        return PieceSpec(name, build, block_flops(config, seq, causal=False), out, is_block=True)

    project = PieceSpec(
        blocks.replace("blocks", "project"),
        lambda built: Project(config, split),
        2.0 * seq * m.width_of_embedding() * m.hidden,
        out,
    )
    needed = (project,) if m.width_of_embedding() != m.hidden else ()
    return *needed, *(block(f"{blocks}.{i}") for i in range(m.layers))


def words_flops(config: Config, width: int) -> float:
    """Of a head over masked words, on a sample."""
    inner, seq = config.model.width_of_embedding(), config.data.seq
    return 2.0 * seq * width * inner + 2.0 * seq * config.objective.masked * inner * config.padded_vocab()


def pieces(config: Config, split: Split) -> tuple[PieceSpec, ...]:
    """The whole model, in order."""
    m = config.model
    task = config.objective.name in TASKS
    tied = (TOKENS,) if m.tied and not task else ()
    embedded = hidden_of(config, split, m.width_of_embedding())
    if task:
        head = PieceSpec("head", lambda built: task_head(config, split), task_flops(config))
        return PieceSpec("embed", lambda built: Embed(config, split), 0.0, embedded), *encoder(config, split), head
    return (
        PieceSpec("embed", lambda built: Embed(config, split), 0.0, embedded, shares=tied),
        *encoder(config, split),
        PieceSpec(
            "head",
            lambda built: Head(config, split, built.get("embed")),
            words_flops(config, m.hidden),
            shares=tied,
        ),
    )
