"""The decoder (GPT, BLOOM, Llama) as a tuple of named pieces: embed, blocks.0 …, head. Only a rank's own are built.

    tokens --Embed--> hidden --Block × L--> hidden --Head--> terms of the loss

A piece maps a payload (named tensors) to a payload; pipeline/stage.py strings them together.
B sequences, S positions, D model width, V vocabulary (padded), v = V/tp, s = S/tp under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.models.attention import Cache
from roots_dist.models.block import Block
from roots_dist.models.norms import Dropout, Norm
from roots_dist.models.positions import Alibi, Rotary, sinusoids
from roots_dist.objectives.base import IGNORE, MicroBatch, Term
from roots_dist.sharding import ShardSpec, declare
from roots_dist.tensor.collectives import Split, enter
from roots_dist.tensor.cross_entropy import linear_cross_entropy, logits
from roots_dist.tensor.embedding import VocabEmbedding

TIED_NAME = "embed.tokens.weight"


class Embed(nn.Module):
    def __init__(self, config: Config, split: Split):
        super().__init__()
        m = config.model
        self.split, self.width, self.positions = split, m.hidden, m.positions
        self.tokens = VocabEmbedding(split, config.padded_vocab(), m.hidden, std=m.std(), tied=m.tied)
        spec = ShardSpec(shape=(config.data.seq, m.hidden), std=m.std(), partial=split.sequence)
        self.places = declare(self, "places", spec, split.tp) if m.positions == "learned" else None
        self.norm = Norm(config, split) if m.embedding_norm else None
        self.dropout = Dropout(config, split, "embed")

    def forward(self, payload: None, batch: MicroBatch, cache: Cache | None = None) -> dict[str, Tensor]:
        start = cache.length if cache else 0
        mine = self.split.positions(batch.tokens.shape[1])
        mine = range(start + mine.start, start + mine.stop)
        x = self.tokens(batch.tokens)  # [B, s, D]
        if self.places is not None:
            x = x + self.places[mine.start : mine.stop]
        elif self.positions == "sinusoidal":
            x = x + sinusoids(mine, self.width, x.device).to(x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        return {"hidden": self.dropout(x, batch)}


class Head(nn.Module):
    """Last norm, output projection and loss. A tied projection is the embedding itself where both are on this rank,
    else a copy of it."""

    def __init__(self, config: Config, split: Split, embed: Embed | None):
        super().__init__()
        m = config.model
        self.config, self.split = config, split
        self.norm = Norm(config, split) if m.norm_position == "pre" else None
        if m.tied and embed is not None:
            self.weight = embed.tokens.weight
        else:
            spec = ShardSpec(
                shape=(config.padded_vocab(), m.hidden),
                cut=0,
                std=m.std(),
                tied=m.tied,
                copy_of=TIED_NAME if m.tied else None,
            )
            self.weight = declare(self, "weight", spec, split.tp)

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch, cache: Cache | None = None) -> tuple:
        """The loss's terms (in evaluation the plain cross-entropy); or, where batch.read asks for a position, its logits,
        float32 [B, V] on every tensor rank."""
        x = payload["hidden"]  # [B, s, D]
        x = enter(x if self.norm is None else self.norm(x), self.split)  # [B, S, D]
        vocab, objective = self.config.model.vocab, self.config.objective
        if batch.read is not None:
            return (logits(self.split, x[:, batch.read], self.weight, vocab),)
        total = linear_cross_entropy(
            self.split,
            x.flatten(0, 1),
            self.weight,
            batch.targets.flatten(),
            vocab=vocab,
            smoothing=objective.label_smoothing if self.training else 0.0,
            z_loss=objective.z_loss if self.training else 0.0,
            chunk=self.config.advanced.loss_chunk,
        )
        return (Term(total, (batch.targets != IGNORE).sum()),)


@dataclass(frozen=True)
class PieceSpec:
    """A piece before it is built."""

    name: str
    build: Callable[[Mapping[str, nn.Module]], nn.Module]
    """Given the pieces that this rank has built before it."""
    cost: float
    """Forward FLOPs per token (matrix products), for balancing stages."""
    is_block: bool = False


def pieces(config: Config, split: Split) -> tuple[PieceSpec, ...]:
    """The whole model, in order. Building a piece makes this rank's slices, uninitialised."""
    m = config.model
    positions: Rotary | Alibi | None = None
    if m.positions == "rotary":
        positions = Rotary(m.width_of_head(), m.rope_theta)
    elif m.positions == "alibi":
        here = m.heads // split.tp.size
        positions = Alibi(m.heads, slice(split.tp.rank * here, (split.tp.rank + 1) * here))

    hq, hkv = m.heads * m.width_of_head(), m.num_kv_heads() * m.width_of_head()
    block_cost = (
        2 * m.hidden * (2 * hq + 2 * hkv) + 2 * (3 if m.gated() else 2) * m.hidden * m.width_of_ffn() + 2 * config.data.seq * hq
    )

    def block(name: str) -> PieceSpec:
        return PieceSpec(name, lambda built: Block(config, split, name, positions), block_cost, is_block=True)

    return (
        PieceSpec("embed", lambda built: Embed(config, split), 0.0),
        *(block(f"blocks.{i}") for i in range(m.layers)),
        PieceSpec("head", lambda built: Head(config, split, built.get("embed")), 2.0 * m.hidden * config.padded_vocab()),
    )


def payload_spec(config: Config, split: Split, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what one stage hands to the next: static, so that nothing is announced before it is sent."""
    shape = (config.train.micro_batch, len(split.positions(config.data.seq)), config.model.hidden)
    return {"hidden": (shape, dtype)}
