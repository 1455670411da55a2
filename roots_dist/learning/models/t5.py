"""The encoder-decoder (T5, Raffel et al. 2020; v1.1 with a gated MLP and an untied head) as one tuple of named pieces.

    tokens --embed--> encoder.blocks --bridge--> decoder.blocks --head--> term
                                     norm: encoded ────┴─ passed through, its gradient is accumulated on the way back

The boundary between the stacks may be on any pipeline stage. No biases, no scale in attention, RMSNorm before each
branch, a learned relative bias with one table per stack. B sequences, S positions of the encoder, T of the decoder, D
width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from roots_dist.accounting.sizes import decoder_of
from roots_dist.config.records import target_seq
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.block import Block, attention_flops, block_flops
from roots_dist.learning.models.embed import TOKENS, Embed, embed_of, vocab_embedding
from roots_dist.learning.models.mlp import mlp_flops
from roots_dist.learning.models.norms import Dropout, Norm
from roots_dist.learning.models.pieces import Built, PayloadSpec, PieceSpec, compute_dtype, hidden_spec
from roots_dist.learning.models.positions import Relative
from roots_dist.learning.models.vocab_head import VocabHead
from roots_dist.parallel.tensor.collectives import TensorParallel, copy_to_tp_region
from roots_dist.parallel.tensor.embedding import VocabParallelEmbedding
from roots_dist.world.batch import MicroBatch, PieceOutput


class Bridge(nn.Module):
    """The end of the encoder (its final norm) and the start of the decoder (its token embedding, which is the
    encoder's)."""

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None):
        super().__init__()
        self.tp, self.norm = tp, Norm(config, tp)
        self.dropout = Dropout(config, tp, "encoder.end")
        self.tokens = embed.tokens if embed else vocab_embedding(config, tp, copy_of=TOKENS)
        self.start = Dropout(config, tp, "decoder.embed")

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> dict[str, Tensor]:
        mine = self.tp.of_context(present(batch.decoder_tokens))
        words = self.start(self.tokens(mine), batch)  # [B, t, D]
        if "hidden" not in payload:  # the encoder's output is already in the cache
            return {"hidden": words}
        return {"encoded": self.dropout(self.norm(payload["hidden"]), batch), "hidden": words}


class Seq2SeqHead(nn.Module):
    """Final norm, output projection and loss. A tied projection is the embedding, and its input is scaled by D^-0.5."""

    def __init__(self, config: Config, tp: TensorParallel, tokens: VocabParallelEmbedding | None):
        super().__init__()
        m = config.model
        self.tp, self.scale = tp, m.hidden**-0.5 if m.tied_embeddings else 1.0
        self.norm = Norm(config, tp)
        self.dropout = Dropout(config, tp, "decoder.end")
        self.vocab_head = VocabHead(config, tp, config.objective.name)
        self.weight = self.vocab_head.weight(self, tokens.weight if tokens else None)

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        x = self.dropout(self.norm(payload["hidden"]), batch) * self.scale  # [B, t, D]
        return PieceOutput((self.vocab_head(copy_to_tp_region(x, self.tp), self.weight, batch, self.training),))


def _stack(
    config: Config,
    tp: TensorParallel,
    name: str,
    cost: float,
    out: Callable[[MicroBatch], PayloadSpec],
    *,
    causal: bool,
    cross: bool,
) -> list[PieceSpec]:
    """Blocks that share one relative bias table: the first block of the stack holds it, and the first block on every
    other pipeline rank holds a copy."""
    table = f"{name}.blocks.0.attention.relative.weight"
    relative = config.model.positions == "relative"

    def block(i: int) -> PieceSpec:
        def build(built: Built) -> Block:
            here = [piece for n, piece in built.items() if n.startswith(f"{name}.blocks.") and isinstance(piece, Block)]
            positions = None
            if relative:
                copy = None if i == 0 else table
                positions = here[0].attention.relative if here else Relative(config, tp, causal, copy)
            return Block(config, tp, f"{name}.blocks.{i}", positions, causal=causal, cross=cross)

        shared_params = (table,) if relative else ()
        return PieceSpec(
            f"{name}.blocks.{i}",
            build,
            cost,
            out,
            is_block=True,
            kind=(name, i == 0),
            prefill_only=not causal,
            shared_params=shared_params,
        )

    return [block(i) for i in range(config.model.layers)]


def pieces(config: Config, tp: TensorParallel) -> tuple[PieceSpec, ...]:
    """Pieces of both stacks, in order."""
    m, seq, target = config.model, config.data.seq_length, target_seq(config)
    encoded, dtype = hidden_spec(config, tp, m.hidden), compute_dtype(config)

    def both(batch: MicroBatch) -> PayloadSpec:
        size, seq = present(batch.decoder_tokens).shape
        spec: PayloadSpec = {"hidden": ((size, len(tp.positions(seq)), m.hidden), dtype)}
        if not batch.has_past:
            spec["encoded"] = encoded(batch)["hidden"]
        return spec

    cross = attention_flops(config, target, seq, seq)
    decoder_cost = attention_flops(config, target, target / 2, target) + cross + mlp_flops(config, target)
    words = (TOKENS,)  # shared by both stacks, whether or not the head is tied

    def head(built: Built) -> Seq2SeqHead:
        holder = built.get("embed") or built.get("bridge")
        return Seq2SeqHead(config, tp, holder.tokens if isinstance(holder, (Embed, Bridge)) else None)

    return (
        PieceSpec("embed", lambda built: Embed(config, tp), 0.0, encoded, shared_params=words, prefill_only=True),
        *_stack(config, tp, "encoder", block_flops(config, seq, causal=False), encoded, causal=False, cross=False),
        PieceSpec("bridge", lambda built: Bridge(config, tp, embed_of(built)), 0.0, both, shared_params=words),
        *_stack(decoder_of(config), tp, "decoder", decoder_cost, both, causal=True, cross=True),
        PieceSpec(
            "head",
            head,
            2.0 * target * m.hidden * m.vocab,
            shared_params=words if m.tied_embeddings else (),
        ),
    )
