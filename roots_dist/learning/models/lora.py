"""Low-rank adaptation (Hu et al. 2021): alpha/rank · b a is trained beside the frozen matrix W of a block.

    [PieceSpec] --with_adapters--> the same, building linear layers in finetune.lora_targets with adapters

An adapter is sharded like the layer that it adapts (parallel/tensor/linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from roots_dist.config.finetune import FinetuneConfig
from roots_dist.learning.models.pieces import Built, PieceSpec


def with_adapters(specs: Sequence[PieceSpec], finetune: FinetuneConfig) -> tuple[PieceSpec, ...]:
    """Specs whose blocks get adapters when they are built."""

    def one(spec: PieceSpec) -> PieceSpec:
        def build(built: Built) -> nn.Module:
            piece = spec.build(built)
            for name, layer in list(piece.named_modules()):
                if name.rpartition(".")[2] in finetune.lora_targets and hasattr(layer, "adapt"):
                    layer.adapt(finetune.lora_rank, finetune.lora_alpha / finetune.lora_rank)
            return piece

        return replace(spec, build=build)

    return tuple(one(spec) if spec.is_block else spec for spec in specs)


def merge_adapter(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Merge an adapter, a [rank, in] and b [out, rank], into the weight [out, in]."""
    return weight + (alpha / a.shape[0]) * (b @ a).to(weight.dtype)
