"""Models as tuples of named pieces, each with its output, its cost and the parameters that it shares.

    learning/models/gpt.py, bert.py, electra.py, t5.py --(PieceSpec, …)--> assembly/: stages, ties between stages

A piece maps a payload (named tensors) and a microbatch to the next payload. B sequences, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from roots_dist.config.schema import Config
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import MicroBatch

PayloadSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape on this rank and dtype of each tensor in a payload. Integer tensors have no gradient."""
Built = Mapping[str, nn.Module]


@dataclass(frozen=True)
class PieceSpec:
    """A piece before it is built."""

    name: str
    build: Callable[[Built], nn.Module]
    """Build the piece, given the pieces that this rank has already built. Creates this rank's slices, uninitialized."""
    cost: float
    """Forward FLOPs of one sample (matrix products), for balancing stages."""
    out: Callable[[MicroBatch], PayloadSpec] = lambda batch: {}
    """Payload that the piece returns for this microbatch; both ends of a message know it in advance."""
    is_block: bool = False
    kind: Hashable | None = None
    """Equal for pieces of a model that differ in nothing but their name, so that one of them tells what the others are;
    None if there is no other like this one."""
    prefill_only: bool = False
    """True if the piece has nothing to do once the cache holds preceding tokens (an encoder, whose input does not
    grow)."""
    shared_params: tuple[str, ...] = ()
    """Global names of parameters that other pieces use too. Pieces on the same rank use one tensor; every other
    pipeline rank holds a copy."""

    def output_spec(self, batch: MicroBatch) -> PayloadSpec:
        """Payload that the piece returns; empty if it is skipped."""
        return {} if self.prefill_only and batch.has_past else self.out(batch)


def compute_dtype(config: Config) -> torch.dtype:
    """Dtype of weights and activations in the computation."""
    if config.advanced.float64:
        return torch.float64
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]


def gradient_dtype(config: Config) -> torch.dtype:
    """Dtype in which the gradients of parameters are summed: float32, where nobody asks for less."""
    dtype = compute_dtype(config)
    return dtype if config.advanced.grad_dtype == "bf16" else torch.promote_types(dtype, torch.float32)


def hidden_spec(config: Config, tp: TensorParallel, width: int) -> Callable[[MicroBatch], PayloadSpec]:
    """Payload between the blocks of one stack: {"hidden": [B, s, D]}, for tokens [B, S] of whole sequences."""
    dtype = compute_dtype(config)

    def out(batch: MicroBatch) -> PayloadSpec:
        size, seq = batch.tokens.shape
        return {"hidden": ((size, len(tp.positions(seq)), width), dtype)}

    return out
