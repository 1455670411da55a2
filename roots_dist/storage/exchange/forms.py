"""Conversions between one of their tensors and one or more of ours, each defined in both directions so that they agree.

    theirs --split--> ours, one after the other --join--> theirs, bit by bit

H heads, G key/value heads, K head width, D model width, V vocabulary (ours is padded). Our weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.config.schema import Config

ROBERTA_OFFSET = 2
"""The first position of RoBERTa is its padding id + 1, and its padding id is 1. OPT kept the offset without the
reason."""


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


def _split_qkv_by_group(config: Config, w: Tensor) -> tuple[Tensor, ...]:
    m = config.model
    each = w.unflatten(0, (m.num_kv_heads(), -1, m.width_of_head()))
    return tuple(part.flatten(0, 2) for part in (each[:, :-2], each[:, -2:-1], each[:, -1:]))


def _join_qkv_by_group(config: Config, parts: Sequence[Tensor]) -> Tensor:
    m = config.model
    grouped = [w.unflatten(0, (m.num_kv_heads(), -1, m.width_of_head())) for w in parts]
    return torch.cat(grouped, 1).flatten(0, 2)


def _stacked(sizes: Callable[[Config], list[int]]) -> Form:
    """Several of our matrices, one below the other in theirs. sizes: rows of each."""
    return Form(
        lambda config, w: tuple(w.split(sizes(config))),
        lambda config, parts: torch.cat(list(parts)),
    )


def _rows_of_qkv(config: Config) -> list[int]:
    m = config.model
    keys = m.num_kv_heads() * m.width_of_head()
    return [m.heads * m.width_of_head(), keys, keys]


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
QKV_BY_GROUP = Form(_split_qkv_by_group, _join_qkv_by_group)
"""Rows ordered [G, H/G + 2, K]: the query heads of a group, its key, its value. With G = H, as in BLOOM and GPT-NeoX,
it is [H, 3, K]; with one group, as in Falcon 7B, query, key and value follow each other."""
QKV_ROWS = _stacked(_rows_of_qkv)
"""Phi-3: rows of all query heads, of all key heads, of all value heads."""
GATE_UP_ROWS = _stacked(lambda config: [config.model.width_of_ffn()] * 2)
"""Phi-3: rows of the gate, then those of the matrix that it gates."""
POSITIONS_AFTER_PADDING = Form(lambda config, w: (w[ROBERTA_OFFSET:],), _prepend_offset_rows)
"""Positions of RoBERTa and OPT; the first rows are only of padding."""
NO_SEGMENTS = Form(lambda config, w: (), lambda config, parts: torch.zeros(1, config.model.width_of_embedding()))
"""Segments of a model that has none, where theirs must have one: zeros have the same effect."""
