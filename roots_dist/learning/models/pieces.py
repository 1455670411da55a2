"""What every model is: a tuple of named pieces, each with what it hands on, what it costs, what it shares with others.

    learning/models/gpt.py, bert.py, electra.py, t5.py
        --(PieceSpec, …)--> assembly/run.py: stages of them, ties between stages

A piece maps a payload (named tensors) and a microbatch to the next payload. B sequences, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from roots_dist.config.schema import Config
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import MicroBatch

PayloadSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Of each tensor that a piece hands on: its shape on this rank and its dtype. Integers have no gradient."""
Built = Mapping[str, nn.Module]


@dataclass(frozen=True)
class PieceSpec:
    """A piece before it is built."""

    name: str
    build: Callable[[Built], nn.Module]
    """Given the pieces that this rank has built before it. Makes this rank's slices, uninitialised."""
    cost: float
    """Forward FLOPs of a sample (matrix products), for balancing stages."""
    out: Callable[[MicroBatch], PayloadSpec] = lambda batch: {}
    """What it hands on for this microbatch: known to both ends of a message before it is sent."""
    is_block: bool = False
    prefill_only: bool = False
    """What it reads does not grow (an encoder): where tokens go on, it has nothing to do and hands nothing on."""
    shares: tuple[str, ...] = ()
    """Global names of the parameters that other pieces use too. Where these stand on other pipeline ranks, each rank
    has a copy; on one rank, `build` finds the one that is there."""

    def output_spec(self, batch: MicroBatch) -> PayloadSpec:
        return {} if self.prefill_only and batch.has_past else self.out(batch)


def dtype_of(config: Config) -> torch.dtype:
    """What weights and activations are computed in."""
    if config.advanced.float64:
        return torch.float64
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]


def hidden_of(config: Config, tp: TensorParallel, width: int) -> Callable[[MicroBatch], PayloadSpec]:
    """The payload between the blocks of one stack: {"hidden": [B, s, D]}."""
    dtype = dtype_of(config)

    def out(batch: MicroBatch) -> PayloadSpec:
        size, seq = batch.tokens.shape
        return {"hidden": ((size, len(tp.positions(seq)), width), dtype)}

    return out
