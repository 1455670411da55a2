"""How a tensor of theirs holds one of ours, or several: each form says it in both directions, so that they cannot
diverge.

    theirs --split--> ours, one after the other --join--> theirs, bit by bit

H heads, K width of a head, D model width, V words (ours are padded). Weights are [out, in] with us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.config.schema import Config

ROBERTA_PLACES = 2
"""RoBERTa counts positions from the padding's id + 1, and its padding is 1."""


class Form(NamedTuple):
    split: Callable[[Config, Tensor], tuple[Tensor, ...]]
    join: Callable[[Config, Sequence[Tensor]], Tensor]


def _turned(w: Tensor) -> Tensor:
    """A bias is the same either way."""
    return w.t() if w.dim() == 2 else w


def _padded(config: Config, w: Tensor) -> tuple[Tensor, ...]:
    """Words that only fill up are zeros."""
    whole = w.new_zeros(config.padded_vocab(), *w.shape[1:])
    whole[: config.model.vocab] = w
    return (whole,)


def _heads_apart(config: Config, w: Tensor) -> tuple[Tensor, ...]:
    each = w.unflatten(0, (config.model.heads, 3, -1))
    return tuple(each[:, i].flatten(0, 1) for i in range(3))


def _heads_together(config: Config, parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([w.unflatten(0, (config.model.heads, -1)) for w in parts], 1).flatten(0, 2)


def _after_nothing(config: Config, parts: Sequence[Tensor]) -> Tensor:
    (w,) = parts
    return torch.cat([w.new_zeros(ROBERTA_PLACES, *w.shape[1:]), w])


SAME = Form(lambda config, w: (w,), lambda config, parts: parts[0])
TURNED = Form(lambda config, w: (_turned(w),), lambda config, parts: _turned(parts[0]))
"""[in, out], as GPT-2's Conv1D."""
WORDS = Form(_padded, lambda config, parts: parts[0][: config.model.vocab])
"""A row for each word: [V, ...]."""
QKV_TURNED = Form(
    lambda config, w: tuple(map(_turned, w.chunk(3, -1))),
    lambda config, parts: torch.cat([_turned(w) for w in parts], -1),
)
"""GPT-2's: [in, q | k | v], each turned."""
QKV_BY_HEAD = Form(_heads_apart, _heads_together)
"""BLOOM's and GPT-NeoX's: rows ordered [H, 3, K]."""
PLACES_AFTER_PADDING = Form(lambda config, w: (w[ROBERTA_PLACES:],), _after_nothing)
"""RoBERTa's positions; the first rows belong to no text."""
NO_SEGMENTS = Form(lambda config, w: (), lambda config, parts: torch.zeros(1, config.model.width_of_embedding()))
"""Of a model without segments, where theirs must have one: zeros say the same."""
