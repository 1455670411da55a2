"""The words between data, model and trainer: a microbatch goes in, terms of a loss come out.

    learning/data/batches.py --MicroBatch--> models/ --Terms--> runs/train/step.py, which alone divides

B sequences, S positions (of the encoder, where there are two stacks), T positions of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from roots_dist.errors import present

IGNORE = -100
"""A target that is not scored."""
PADDING = -1
"""The document that padding belongs to."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass of one rank reads. Fields that an objective has no use for are None.

    Every pipeline and tensor rank makes its own copy from (seed, step, place): nothing is broadcast.
    """

    tokens: Tensor
    """int64 [B, S]"""
    targets: Tensor | None = None
    """int64 [B, S], of two stacks [B, T]: the id to predict at each position, or IGNORE"""
    samples: Tensor
    """int64 [B]: number of each sample in the whole run, counted from 0. Dropout masks are keyed on it."""
    step: int = 0
    documents: Tensor | None = None
    """int64 [B, S]: attention stays among positions with equal numbers; PADDING is seen by none but padding"""
    position_ids: Tensor | None = None
    """int64 [B, S]: which position's vector each takes; None: 0, 1, 2 …"""
    segments: Tensor | None = None
    """int64 [B, S]: which segment (first or second text) each belongs to"""
    labels: Tensor | None = None
    """int64 [B]: the class of each sequence; or [B, S], of each position, or IGNORE"""
    originals: Tensor | None = None
    """int64 [B, S]: the text before any of it was hidden, or IGNORE where no judgement of it is scored"""
    decoder_tokens: Tensor | None = None
    """int64 [B, T]: what the decoder reads"""
    read: int | slice | Literal["targets"] | None = None
    """Instead of the loss: the logits at this position or these, or of each target its log-probability."""
    cache: KVCache | None = None
    """Keys and values of the tokens before these (generation)."""

    @property
    def has_past(self) -> bool:
        """There are tokens before these, kept in the cache."""
        return self.cache is not None and self.cache.length > 0

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {
            n: t.to(device, non_blocking=True) for n, t in vars(self).items() if isinstance(t, Tensor)
        }
        return replace(self, **moved)


class KVCache:
    """Keys and values so far, for generation: a pair for each attention of this rank, and how many tokens they
    cover."""

    def __init__(self) -> None:
        self.length = 0
        """Of what has been read: the caller counts on, when all blocks have seen the new tokens."""
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, g, S, K] to the pair of that name; return the whole."""
        if name in self._pairs:
            k, v = (torch.cat(pair, 2) for pair in zip(self._pairs[name], (k, v)))
        self._pairs[name] = (k, v)
        return k, v

    def get(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The pair as it is: of cross-attention, which never grows."""
        return self._pairs.get(name)

    def put(self, name: str, k: Tensor, v: Tensor) -> None:
        self._pairs[name] = (k, v)

    def select(self, rows: Tensor) -> None:
        """Go on with these of the sequences: int64 [new B], in this order (beam search)."""
        self._pairs = {name: (k[rows], v[rows]) for name, (k, v) in self._pairs.items()}


@dataclass(frozen=True)
class Term:
    """One part of a loss, as a sum and a count. Only the trainer divides, by the count of the whole step: then the
    loss is the same for any number of microbatches and data ranks."""

    name: str
    """As in the objective's weights."""
    sum: Tensor
    """scalar, differentiable"""
    count: Tensor
    """how many targets the sum runs over; a scalar on the device: nothing waits for it"""
    hits: Tensor | None = None
    """how many of them the model's best guess meets"""
    table: Tensor | None = None
    """int64 [C, C], of a few classes: how many targets of each (rows) the model took for each (columns)"""

    def detached(self) -> Term:
        return replace(self, sum=self.sum.detach())


@dataclass(frozen=True)
class PieceOutput:
    """What a piece returns that finds something: what it found, and the payload that goes on (none after the last)."""

    found: tuple[Any, ...]
    """Terms of the loss; or the one thing that batch.read asks for"""
    payload: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is learned from which data. OBJECTIVES (learning/objectives/__init__.py) holds the classes by name.

    Made of (config, specials): the special tokens of data.tokenizer, or None where there is no tokenizer.
    """

    @property
    def weights(self) -> Mapping[str, float]:
        """Of each term in the loss, by its name."""
        ...

    @property
    def words(self) -> str | None:
        """The term that is a mean of -log p(word), and so has a perplexity."""
        ...

    def open(self, path: str) -> Any:
        """A source of samples: what a path under data.train or data.validation stands for."""
        ...

    def num_samples(self, source: Any) -> int:
        """Of one pass over the source. Raises DataError if it cannot give one."""
        ...

    def sample(self, source: Any, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """One sample: fields of a MicroBatch without B. A pure function of its arguments; `draw` is keyed on (seed,
        number of the sample in the run), so that each pass over the data draws anew and no layout or resume matters."""
        ...

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        """Scored targets of each term: what the trainer sums over the step and divides by."""
        ...


def stack_samples(samples: list[dict[str, np.ndarray]], numbers: np.ndarray, step: int) -> MicroBatch:
    """Samples [B] as a microbatch, int64."""
    fields: dict[str, Any] = {
        n: torch.from_numpy(np.stack([s[n] for s in samples]).astype(np.int64, copy=False)) for n in samples[0]
    }
    return MicroBatch(**fields, samples=torch.from_numpy(np.array(numbers, dtype=np.int64)), step=step)


def scored(targets: Tensor | None) -> int:
    return int(torch.count_nonzero(present(targets) != IGNORE))
