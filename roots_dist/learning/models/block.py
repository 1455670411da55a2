"""One Transformer block: self-attention (with cross-attention in an encoder-decoder's decoder), then MLP or experts,
each with a norm and on the residual stream; where the norm stands, `model.norm_position` says.

B sequences, D model width; s = S/tp under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.models.attention import Attention, Encoding
from roots_dist.learning.models.cross_attention import CrossAttention
from roots_dist.learning.models.experts import Experts, experts_flops
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.learning.models.latent_attention import LatentAttention, latent_attention_flops
from roots_dist.learning.models.mlp import MLP, mlp_flops
from roots_dist.learning.models.norms import Dropout, Norm
from roots_dist.learning.models.positions import Window
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.linear import column_parallel_on, row_parallel_sum
from roots_dist.world.batch import MicroBatch, PieceOutput, Term


class Block(nn.Module):
    """cross: between self-attention and MLP, attend to payload["encoded"], which is passed on. experts: instead of one
    MLP."""

    def __init__(
        self,
        config: Config,
        tp: TensorParallel,
        name: str,
        positions: Encoding,
        *,
        causal: bool = True,
        cross: bool = False,
        window: Window | None = None,
        experts: bool = False,
    ):
        super().__init__()
        m, inits = config.model, init_stds(config)
        self.tp, self.parallel = tp, m.has_parallel_branches()
        self.norm_position, self.multiplier = m.norm_position, m.residual_multiplier
        self.norm1 = Norm(config, tp)
        self.attention = (Attention if m.kv_lora_rank is None else LatentAttention)(
            config, tp, name, positions, inits, causal=causal, document_mask=not cross, window=window
        )
        self.dropout1 = Dropout(config, tp, f"{name}.1")
        self.cross: CrossAttention | None = None
        if cross:
            self.cross_norm = Norm(config, tp)
            self.cross = CrossAttention(config, tp, f"{name}.cross", inits)
            self.cross_dropout = Dropout(config, tp, f"{name}.cross")
        self.norm2 = None if m.branches == "parallel_one_norm" else Norm(config, tp)
        self.mlp = (Experts if experts else MLP)(config, tp, name, inits)
        self.dropout2 = Dropout(config, tp, f"{name}.2")
        sandwich = m.norm_position == "sandwich"
        self.out_norm1, self.out_norm2 = (Norm(config, tp) if sandwich else None for _ in range(2))

    def forward(self, payload: dict[str, Tensor], batch: MicroBatch) -> dict[str, Tensor] | PieceOutput:
        """The payload with another hidden [B, s, D]; with terms of the loss if experts have some."""
        terms: list[Term] = []
        if self.parallel:
            return payload | {"hidden": self._parallel(payload["hidden"], batch)}

        def attend(x: Tensor) -> Tensor:
            out: Tensor = self.dropout1(self.attention(x, batch), batch)
            return out

        def cross_attend(x: Tensor) -> Tensor:
            out: Tensor = self.cross_dropout(present(self.cross)(x, batch, payload.get("encoded")), batch)
            return out

        def feed_forward(x: Tensor) -> Tensor:
            y = self.mlp(x, batch, terms) if isinstance(self.mlp, Experts) else self.mlp(x, batch)
            out: Tensor = self.dropout2(y, batch)
            return out

        x = self._add(payload["hidden"], attend, self.norm1, self.out_norm1)  # [B, s, D]
        if self.cross is not None:
            x = self._add(x, cross_attend, self.cross_norm)
        payload = payload | {"hidden": self._add(x, feed_forward, present(self.norm2), self.out_norm2)}
        return PieceOutput(tuple(terms), payload) if terms else payload

    def _parallel(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """Both branches at once: one pass through the tensor-parallel region, one sum, one dropout mask."""
        assert isinstance(self.mlp, MLP), "the checks refuse experts here"
        normed = (self.norm1(x),) if self.norm2 is None else (self.norm1(x), self.norm2(x))
        projections, widenings = self.attention.projections(), self.mlp.widenings()
        reading = [*((0, layer) for layer in projections), *((len(normed) - 1, layer) for layer in widenings)]
        q, k, v, *wide = column_parallel_on(self.tp, normed, reading)
        mixed = self.attention.mix(q, k, v, batch)
        both = row_parallel_sum(self.tp, [(self.attention.out, (mixed,), None), self.mlp.narrowing(wide, batch)])
        return x + self._scaled(self.dropout1(both, batch))

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: Norm, out_norm: Norm | None = None) -> Tensor:
        """The residual stream after a branch."""
        if self.norm_position == "pre":
            return x + self._scaled(branch(norm(x)))
        if self.norm_position == "branch":
            return x + self._scaled(norm(branch(x)))
        if self.norm_position == "sandwich":
            return x + self._scaled(present(out_norm)(branch(norm(x))))
        return norm(x + self._scaled(branch(x)))  # type: ignore[no-any-return] # torch types no call

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1 else x * self.multiplier


def attention_flops(config: Config, queries: int, keys: float, inputs: int) -> float:
    """Forward FLOPs of `queries` positions that attend to `keys` each; `inputs` are projected to keys and values."""
    m = config.model
    hq, hkv = m.heads * m.width_of_head(), m.num_kv_heads() * m.width_of_head()
    return 4.0 * queries * m.hidden * hq + 4.0 * inputs * m.hidden * hkv + 4.0 * queries * keys * hq


def block_flops(
    config: Config, seq: int, causal: bool = True, window: int | None = None, experts: bool = False
) -> float:
    """Forward FLOPs of a self-attention block on one sample; causal attention computes half of the scores, and within a
    window the keys of that."""
    keys = seq / 2 if causal else seq
    if window is not None and window < seq:
        keys = window * (1 - window / (2 * seq))
    by_latents = config.model.kv_lora_rank is not None
    attention = latent_attention_flops(config, seq, keys) if by_latents else attention_flops(config, seq, keys, seq)
    return attention + (experts_flops if experts else mlp_flops)(config, seq)
