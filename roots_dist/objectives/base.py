"""The words between data, model and trainer: a microbatch goes in, terms of a loss come out.

    data/batches.py --MicroBatch--> models/ --Terms--> train/step.py, which alone divides
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""A target that is not scored."""


class Window(NamedTuple):
    """Which part of the stream is sample j: `length` tokens from j · stride on."""

    stride: int
    length: int


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank reads. B sequences, S positions.

    Every pipeline and tensor rank makes its own copy from (seed, step, place): nothing is broadcast.
    """

    tokens: Tensor
    """int64 [B, S]"""
    targets: Tensor
    """int64 [B, S]: the id to predict at each position, or IGNORE"""
    samples: Tensor
    """int64 [B]: number of each sample in the whole run, counted from 0. Dropout masks are keyed on it."""
    step: int
    read: int | None = None
    """The position whose logits are asked for, instead of the loss (samples of text during training)."""

    def to(self, device: torch.device) -> MicroBatch:
        tensors = (self.tokens, self.targets, self.samples)
        return MicroBatch(*(t.to(device, non_blocking=True) for t in tensors), self.step, self.read)


@dataclass(frozen=True)
class Term:
    """One part of a loss, as a sum and a count. Only the trainer divides, by the count of the whole step: then the
    loss is the same for any number of microbatches and data ranks."""

    sum: Tensor
    """scalar, differentiable"""
    count: Tensor
    """how many targets the sum runs over; a scalar on the device: nothing waits for it"""
    weight: float = 1.0
