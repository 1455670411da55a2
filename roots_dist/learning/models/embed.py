"""Token, position and segment embeddings with a norm; and a projection if the stack has another width.

B sequences, S positions, E width of the embedding, D width of the stack; s = S/tp under sequence parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.learning.models.init_stds import embedding_std
from roots_dist.learning.models.norms import Dropout, Norm
from roots_dist.learning.models.pieces import Built
from roots_dist.learning.models.positions import sinusoids
from roots_dist.parallel.tensor.by_positions import by_positions
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.embedding import VocabParallelEmbedding
from roots_dist.world.batch import MicroBatch
from roots_dist.world.sharding import ShardSpec, declare

TOKENS = "embed.tokens.weight"
"""Global name of the token embedding, which output projections and second stacks share."""


def vocab_embedding(
    config: Config, tp: TensorParallel, copy_of: str | None = None, shared: nn.Parameter | None = None
) -> VocabParallelEmbedding:
    """The token embedding of the config's model."""
    width, std = config.model.width_of_embedding(), embedding_std(config)
    return VocabParallelEmbedding(tp, config.padded_vocab(), width, std=std, copy_of=copy_of, shared=shared)


class Embeddings(nn.Module):
    """Sum of token, position and segment embeddings, normalized if the model requires it: [B, S] -> [B, s, E].

    copy_of: prefix of global names ("embed") for a copy on another pipeline stage. words: the token embedding of the
    copy, if this rank already holds one.
    """

    def __init__(
        self, config: Config, tp: TensorParallel, copy_of: str | None = None, words: nn.Parameter | None = None
    ):
        super().__init__()
        m = config.model
        self.tp, self.width, self.positions = tp, m.width_of_embedding(), m.positions
        self.multiplier = m.embedding_multiplier

        def original(name: str) -> str | None:
            return f"{copy_of}.{name}" if copy_of else None

        def table(name: str, rows: int, first: Callable[[], Tensor] | None = None) -> nn.Parameter:
            spec = ShardSpec(
                shape=(rows, self.width),
                std=None if first else m.std(),
                init=first,
                partial=tp.has_partial_gradients,
                copy_of=original(name),
            )
            return declare(self, name, spec, tp.axis)

        def sinusoidal_table() -> Tensor:
            return math.sqrt(2) * m.std() * sinusoids(torch.arange(rows), self.width, slowest=rows)

        rows = m.max_positions or config.data.seq_length
        first = sinusoidal_table if config.advanced.sinusoidal_init else None
        self.tokens = vocab_embedding(config, tp, original("tokens.weight"), words)
        self.position_embedding = table("position_embedding", rows, first) if m.positions == "learned" else None
        self.segment_embedding = table("segment_embedding", m.segments) if m.segments else None
        self.norm = Norm(config, tp, self.width, copy_of=original("norm")) if m.embedding_norm else None

    def embedded(self, tokens: Tensor, batch: MicroBatch) -> Tensor:
        """Tokens of this context rank [B, L] -> [B, s, E]."""
        mine = self.tp.positions(tokens.shape[1] * self.tp.cp.size)
        here = mine.after(batch.cache.length if batch.cache else 0)
        x: Tensor = self.tokens(tokens)  # [B, s, E]
        if self.multiplier != 1:  # rounded to the dtype of the weights, as Gemma is trained
            x = x * torch.tensor(self.multiplier, dtype=x.dtype, device="cpu").item()
        if self.position_embedding is not None and self.tp.exact is not None:
            places = here.places(x.device) if batch.position_ids is None else mine.of(batch.position_ids)
            x = by_positions(self.tp, _add_rows, x, places.expand(x.shape[:2]), self.position_embedding)
        elif self.position_embedding is not None:
            x = x + (
                here.of(self.position_embedding, 0)
                if batch.position_ids is None
                else F.embedding(mine.of(batch.position_ids), self.position_embedding)
            )
        elif self.positions == "sinusoidal":
            x = x + self._sinusoids(
                here.places(x.device) if batch.position_ids is None else mine.of(batch.position_ids), x
            )
        if self.segment_embedding is not None and self.tp.exact is not None:
            first = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
            segments = first if batch.segment_ids is None else mine.of(batch.segment_ids)
            x = by_positions(self.tp, _add_rows, x, segments, self.segment_embedding)
        elif self.segment_embedding is not None:
            x = x + (
                self.segment_embedding[0]
                if batch.segment_ids is None
                else F.embedding(mine.of(batch.segment_ids), self.segment_embedding)
            )
        if self.norm is not None:
            x = self.norm(x)
        return x

    def _sinusoids(self, places: Tensor, x: Tensor) -> Tensor:
        """Places [s] or [B, s] -> [..., E] in the dtype of x, computed in float32 (float64 for float64)."""
        return sinusoids(places, self.width, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def _add_rows(x: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """x [B, s, E] + the rows [B, s] of a table [N, E]."""
    return x + F.embedding(rows, table)


class Embed(Embeddings):
    """The model's first piece."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__(config, tp)
        self.dropout = Dropout(config, tp, "embed")

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> dict[str, Tensor]:
        return {"hidden": self.dropout(self.embedded(self.tp.of_context(batch.tokens), batch), batch)}


def embed_of(built: Built) -> Embed | None:
    """The first piece, if this rank has built it: other pieces share its word vectors."""
    embed = built.get("embed")
    return embed if isinstance(embed, Embed) else None


class EmbeddingProjection(nn.Module):
    """Projection to the width of the stack: [B, s, E] -> [B, s, D], the same on every tensor rank."""

    def __init__(self, config: Config, tp: TensorParallel):
        super().__init__()
        m = config.model
        self.tp = tp
        shape = (m.hidden, m.width_of_embedding())
        partial = tp.has_partial_gradients
        self.weight = declare(self, "weight", ShardSpec(shape=shape, std=m.std(), partial=partial), tp.axis)
        self.bias = declare(self, "bias", ShardSpec(shape=shape[:1], partial=partial), tp.axis)

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> dict[str, Tensor]:
        return payload | {"hidden": by_positions(self.tp, F.linear, payload["hidden"], self.weight, self.bias)}
