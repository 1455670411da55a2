"""The decoder (GPT, BLOOM, Llama) as a tuple of named pieces: embed, blocks.0 …, head. A rank builds only its own
pieces.

    tokens --Embed--> hidden --Block × L--> hidden --DecoderHead--> terms of the loss

B sequences, S positions, D model width, V vocabulary (padded), v = V/tp, s = S/tp under sequence parallelism.
"""

from __future__ import annotations

from torch import Tensor, nn

from roots_dist.config.model import LayerKind
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.learning.models.block import Block, block_flops
from roots_dist.learning.models.embed import TOKENS, Embed, embed_of
from roots_dist.learning.models.heads import task_flops, task_head
from roots_dist.learning.models.norms import Norm
from roots_dist.learning.models.pieces import Built, PieceSpec, hidden_spec
from roots_dist.learning.models.positions import Alibi, Window
from roots_dist.learning.models.rotary import Rotary, rotary_of
from roots_dist.learning.models.vocab_head import VocabHead
from roots_dist.parallel.tensor.collectives import TensorParallel, copy_to_tp_region
from roots_dist.world.batch import MicroBatch, PieceOutput


class DecoderHead(nn.Module):
    """Final norm, output projection and loss. A tied projection is the embedding itself if both are on this rank,
    otherwise a copy."""

    def __init__(self, config: Config, tp: TensorParallel, embed: Embed | None):
        super().__init__()
        self.tp = tp
        self.norm = Norm(config, tp) if config.model.ends_with_norm() else None
        self.vocab_head = VocabHead(config, tp, config.objective.name)
        self.weight = self.vocab_head.weight(self, embed.tokens.weight if embed else None)
        self.bias = self.vocab_head.bias(self) if config.model.head_bias else None

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> PieceOutput:
        """The term of the loss (in evaluation the plain cross-entropy), or what batch.logits_at asks for."""
        x = payload["hidden"]  # [B, s, D]
        x = copy_to_tp_region(x if self.norm is None else self.norm(x), self.tp)  # [B, S, D]
        return PieceOutput((self.vocab_head(x, self.weight, batch, self.training, self.bias),))


def make_positions(config: Config, tp: TensorParallel, kind: LayerKind = "full") -> Rotary | Alibi | None:
    """Position encoding of blocks of this kind, one object for all of them on a rank; None if positions are learned."""
    m = config.model
    if m.positions == "rotary":
        return rotary_of(config, kind, tp.fuse)
    if m.positions == "alibi":
        here = m.heads // tp.size
        return Alibi(m.heads, slice(tp.rank * here, (tp.rank + 1) * here))
    return None


def pieces(config: Config, tp: TensorParallel) -> tuple[PieceSpec, ...]:
    """Pieces of the whole model, in order."""
    m, seq = config.model, config.data.seq_length
    positions = {kind: make_positions(config, tp, kind) for kind in dict.fromkeys(m.kinds())}
    window = None if m.window is None else Window(m.window)
    out = hidden_spec(config, tp, m.hidden)
    task = objective_of(config).has_labels
    tied = (TOKENS,) if m.tied_embeddings and not task else ()

    def block(number: int, kind: LayerKind) -> PieceSpec:
        name, experts = f"blocks.{number}", m.has_experts(number)
        mine = window if kind == "window" else None

        def build(built: Built) -> Block:
            return Block(config, tp, name, positions[kind], window=mine, experts=experts)

        cost = block_flops(config, seq, window=mine.size if mine else None, experts=experts)
        return PieceSpec(name, build, cost, out, is_block=True, kind=(kind, experts))

    def head(built: Built) -> nn.Module:
        return task_head(config, tp) if task else DecoderHead(config, tp, embed_of(built))

    cost = task_flops(config) if task else 2.0 * seq * m.hidden * m.vocab
    return (
        PieceSpec("embed", lambda built: Embed(config, tp), 0.0, out, shared_params=tied),
        *(block(i, kind) for i, kind in enumerate(m.kinds())),
        PieceSpec("head", head, cost, shared_params=tied),
    )
