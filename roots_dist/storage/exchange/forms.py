"""Conversions between one of their tensors and one or more of ours, each defined in both directions so that they agree.

    theirs --split--> ours, one after the other --join--> theirs, bit by bit

H heads, K head width, D model width, V vocabulary (ours is padded). Our weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.config.schema import Config

ROBERTA_OFFSET = 2
"""RoBERTa's first position is its padding id + 1, and its padding id is 1."""


class Form(NamedTuple):
    """A conversion between one of their tensors and ours."""

    split: Callable[[Config, Tensor], tuple[Tensor, ...]]
    join: Callable[[Config, Sequence[Tensor]], Tensor]


def _transposed(w: Tensor) -> Tensor:
    """Transpose a matrix; a bias stays as it is."""
    return w.t() if w.dim() == 2 else w


def _pad_vocab(config: Config, w: Tensor) -> tuple[Tensor, ...]:
    """Pad the vocabulary with rows of zeros."""
    whole = w.new_zeros(config.padded_vocab(), *w.shape[1:])
    whole[: config.model.vocab] = w
    return (whole,)


def _split_qkv_by_head(config: Config, w: Tensor) -> tuple[Tensor, ...]:
    each = w.unflatten(0, (config.model.heads, 3, -1))
    return tuple(each[:, i].flatten(0, 1) for i in range(3))


def _join_qkv_by_head(config: Config, parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([w.unflatten(0, (config.model.heads, -1)) for w in parts], 1).flatten(0, 2)


def _prepend_offset_rows(config: Config, parts: Sequence[Tensor]) -> Tensor:
    (w,) = parts
    return torch.cat([w.new_zeros(ROBERTA_OFFSET, *w.shape[1:]), w])


SAME = Form(lambda config, w: (w,), lambda config, parts: parts[0])
TRANSPOSED = Form(lambda config, w: (_transposed(w),), lambda config, parts: _transposed(parts[0]))
"""[in, out], as in GPT-2's Conv1D."""
VOCAB_ROWS = Form(_pad_vocab, lambda config, parts: parts[0][: config.model.vocab])
"""One row per token: [V, ...]."""
QKV_TRANSPOSED = Form(
    lambda config, w: tuple(map(_transposed, w.chunk(3, -1))),
    lambda config, parts: torch.cat([_transposed(w) for w in parts], -1),
)
"""GPT-2: [in, q | k | v], each transposed."""
QKV_BY_HEAD = Form(_split_qkv_by_head, _join_qkv_by_head)
"""BLOOM and GPT-NeoX: rows ordered [H, 3, K]."""
POSITIONS_AFTER_PADDING = Form(lambda config, w: (w[ROBERTA_OFFSET:],), _prepend_offset_rows)
"""RoBERTa's positions; the first rows are never used."""
NO_SEGMENTS = Form(lambda config, w: (), lambda config, parts: torch.zeros(1, config.model.width_of_embedding()))
"""For a model without segments, where theirs must have one: zeros have the same effect."""
