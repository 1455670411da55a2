"""The MLP of a Transformer block, cut by columns and then by rows over tensor ranks.

B sequences, S positions, D model width, F width of the MLP; f = F/tp, s = S/tp under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from roots_dist.config.records import family_of
from roots_dist.config.schema import Config
from roots_dist.learning.models.activations import activation
from roots_dist.learning.models.init_stds import InitStds
from roots_dist.learning.models.norms import mask_rows
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import by_shards
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear, Summand, column_parallel
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch


class MLP(nn.Module):
    """Feed-forward layer, gated or not. T5 also drops inner channels; each tensor rank drops its own of the F."""

    def __init__(
        self,
        config: Config,
        tp: TensorParallel,
        name: str,
        inits: InitStds,
        *,
        ffn: int | None = None,
        of_expert: bool = False,
    ):
        """ffn: width of one of several MLPs whose outputs are summed before anything is sent; None: it is the only one,
        of the width that the config says. of_expert: it is one of the experts that parallel.ep cuts over ranks."""
        super().__init__()
        m = config.model
        width = ffn or m.width_of_ffn()
        self.tp, self.name, self.function = tp, name, activation(config, fuse=tp.fuse)
        self.activation = partial(by_shards, tp, self.function)
        self.drop, self.seed = m.dropout if family_of(config).mlp_dropout else 0.0, config.train.seed
        # a gated activation is cheap, and as wide as what it is made of; under full the whole block is computed again
        is_cheap = m.gated() and not self.drop and config.train.recompute == "none"
        self.recompute = config.train.recompute == "selective" or is_cheap

        def widen() -> ColumnParallelLinear:
            return ColumnParallelLinear(tp, m.hidden, width, bias=m.bias_of_mlp(), std=inits.up, of_expert=of_expert)

        self.up = widen()
        self.gate = widen() if m.gated() else None
        in_sum = ffn is not None or m.has_parallel_branches()
        self.down = RowParallelLinear(
            tp, width, m.hidden, bias=m.bias_of_mlp(), std=inits.down, in_sum=in_sum, of_expert=of_expert
        )

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        _, inputs, activated = self.narrowing(column_parallel(self.tp, x, self.widenings()), batch)
        out: Tensor = self.down(*inputs, activation=activated)
        return out

    def widenings(self) -> list[ColumnParallelLinear]:
        return [self.gate, self.up] if self.gate else [self.up]

    def narrowing(self, wide: Sequence[Tensor], batch: MicroBatch) -> Summand:
        """The last layer, with what it reads: outputs of the first ones [B, S, f], and the activation to be recomputed;
        or these activated."""

        def activated(*wide: Tensor) -> Tensor:
            return self._dropped(self.activation(*wide), batch)

        return (self.down, wide, activated) if self.recompute else (self.down, (activated(*wide),), None)

    def _dropped(self, x: Tensor, batch: MicroBatch) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        rows = mask_rows(self.seed, f"{self.name}.mlp", batch, self.tp.in_region(x.shape[1]), x.device)
        return rng.dropout(x, self.drop, rows, first_column=self.tp.rank * x.shape[-1], fuse=self.tp.fuse)


def mlp_flops(config: Config, seq: int, ffn: int | None = None) -> float:
    """Forward FLOPs of an MLP of this width, by default the config's."""
    m = config.model
    return 2.0 * seq * (3 if m.gated() else 2) * m.hidden * (ffn or m.width_of_ffn())
