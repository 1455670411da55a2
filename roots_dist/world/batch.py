"""The types shared by data, model and trainer: a microbatch goes in, terms of a loss come out.

    learning/data/batches.py --MicroBatch--> models/ --Term--> runs/train/step.py, which alone divides

B sequences, S positions (of the encoder in an encoder-decoder), T positions of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from roots_dist.errors import present

IGNORE = -100
"""Target that is not scored."""
PADDING = -1
"""Document id of padding."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Inputs of one forward pass of one rank. Fields that an objective does not use are None.

    Every pipeline and tensor rank builds its own copy from (seed, step, place): nothing is broadcast.
    """

    tokens: Tensor
    """int64 [B, S]"""
    targets: Tensor | None = None
    """int64 [B, S], or [B, T] in an encoder-decoder: id to predict at each position, or IGNORE"""
    scored_positions: Tensor | None = None
    """int64 [N]: where targets are scored, as indices of the flattened targets, for heads that compute nothing
    elsewhere; None: they look for them. Known to the host before the batch is moved, because a GPU that is asked for
    their number makes the host wait."""
    sample_ids: Tensor
    """int64 [B]: number of each sample in the whole run, counted from 0. Dropout masks are keyed on it."""
    step: int = 0
    document_ids: Tensor | None = None
    """int64 [B, S]: attention is limited to positions with the same id; PADDING is visible only to padding"""
    document_ranges: tuple[tuple[range, ...], ...] | None = None
    """The documents of each sequence, as document_ids tell them. Known to the host before the batch is moved; None if
    there are none, if they are not known, or if an id comes back after another."""
    position_ids: Tensor | None = None
    """int64 [B, S]: position of each token; None means 0, 1, 2 …"""
    segment_ids: Tensor | None = None
    """int64 [B, S]: segment (first or second text) of each token"""
    labels: Tensor | None = None
    """int64 [B]: class of each sequence, or [B, S]: class of each position, or IGNORE"""
    originals: Tensor | None = None
    """int64 [B, S]: the text before masking, or IGNORE where replaced-token detection is not scored"""
    references: Tensor | None = None
    """float64 [B, 2]: log-probability of each document's targets under the model that training starts from (dpo)"""
    decoder_tokens: Tensor | None = None
    """int64 [B, T]: input of the decoder"""
    logits_at: int | slice | Literal["targets"] | None = None
    """Return the logits at this position or slice instead of the loss; "targets" returns the log-probability of each
    target."""
    cache: KVCache | None = None
    """Keys and values of the preceding tokens (generation)."""
    chosen_experts: dict[str, Any] | None = None
    """Experts that a block chose in its first forward, by the layer's name: when backward computes the block again, it
    keeps this choice (Choice of learning/models/experts.py). None if nothing is computed again."""

    @property
    def has_past(self) -> bool:
        """True if the cache holds preceding tokens."""
        return self.cache is not None and self.cache.length > 0

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, with document_ranges."""
        here = self.with_document_ranges()
        moved: dict[str, Any] = {
            n: t.to(device, non_blocking=True) for n, t in vars(here).items() if isinstance(t, Tensor)
        }
        return replace(here, **moved)

    def with_document_ranges(self) -> MicroBatch:
        """The same, with document_ranges if its document_ids are on the host."""
        ids = self.document_ids
        if ids is None or ids.device.type != "cpu" or self.document_ranges is not None:
            return self
        return replace(self, document_ranges=find_documents(ids))

    def pinned(self) -> MicroBatch:
        """The same in page-locked memory, from which a GPU copies while the host goes on."""
        pinned: dict[str, Any] = {n: t.pin_memory() for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **pinned)

    def with_scored_positions(self, cut: Callable[[Tensor], Tensor] = lambda whole: whole) -> MicroBatch:
        """The same, with scored_positions: the last thing before it is moved, since they are those of its targets. cut:
        what a context rank holds of the targets."""
        scored = np.flatnonzero(cut(present(self.targets)).cpu().numpy() != IGNORE)
        return replace(self, scored_positions=torch.from_numpy(scored))

    def with_some_scored(self, cut: Callable[[Tensor], Tensor] = lambda whole: whole) -> MicroBatch:
        """The same, with scored_positions where some positions have no target, and each has a loss of its own."""
        if self.targets is None or self.references is not None:
            return self
        chosen = self.with_scored_positions(cut)
        return self if len(present(chosen.scored_positions)) == cut(self.targets).numel() else chosen


class KVCache:
    """KV cache for generation: one pair per attention layer of this rank, and the number of tokens they cover."""

    def __init__(self) -> None:
        self.length = 0
        """Number of cached tokens. The caller advances it after all blocks have seen the new tokens."""
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, name: str, k: Tensor, v: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
        """Append k and v [B, g, S, K] to the named pair and return the whole pair. keep: how many of the last keys the
        next call still needs; None: all."""
        if name in self._pairs:
            k, v = (torch.cat(pair, 2) for pair in zip(self._pairs[name], (k, v)))
        gone = 0 if keep is None else max(0, k.shape[2] - keep)
        kept = k[:, :, gone:], v[:, :, gone:]
        self._pairs[name] = (kept[0].clone(), kept[1].clone()) if 2 * gone > k.shape[2] else kept  # a view keeps it all
        return k, v

    def get(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The named pair, unchanged. Cross-attention uses it, since its keys and values never grow."""
        return self._pairs.get(name)

    def put(self, name: str, k: Tensor, v: Tensor) -> None:
        """Set the named pair."""
        self._pairs[name] = (k, v)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, int64 [new B], in this order (beam search)."""
        self._pairs = {name: (k[rows], v[rows]) for name, (k, v) in self._pairs.items()}


@dataclass(frozen=True)
class Term:
    """One part of a loss, as a sum and a count. Only the trainer divides, by the count of the whole step, so that the
    loss does not depend on the number of microbatches and data ranks."""

    name: str
    """Name in the objective's weights."""
    sum: Tensor
    """Differentiable scalar."""
    count: Tensor
    """Number of targets in the sum: a scalar on the device, so that nothing waits for it."""
    hits: Tensor | None = None
    """Number of targets that are the model's most likely prediction."""
    confusion: Tensor | None = None
    """Confusion matrix, int64 [C, C]: rows are targets, columns are predictions. Only for heads with few classes."""

    def detached(self) -> Term:
        return replace(self, sum=self.sum.detach())


def added(terms: Sequence[Term]) -> Term:
    """One term of several parts. Their sums are added in float64, as those of ranks are, which rounds nothing here."""
    first, *_ = terms
    hits = [term.hits for term in terms if term.hits is not None]
    count = torch.stack([term.count for term in terms]).sum()
    total = torch.stack([term.sum.double() for term in terms]).sum()
    return Term(first.name, total, count, torch.stack(hits).sum() if hits else None)


@dataclass(frozen=True)
class PieceOutput:
    """Output of a piece that computes results: the results, and the payload for the next piece (empty after the last
    one)."""

    results: tuple[Any, ...]
    """Terms of the loss, or the one value that batch.logits_at asks for."""
    payload: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training objective: what is learned from which data. OBJECTIVES (learning/objectives/__init__.py) maps names to
    classes.

    Constructed from (config, specials): the special tokens of data.tokenizer, or None without a tokenizer.
    """

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each term in the loss, by name."""
        ...

    @property
    def perplexity_term(self) -> str | None:
        """Name of the term that is a mean of -log p(token) and therefore has a perplexity; None if there is none."""
        ...

    def open(self, path: str) -> Any:
        """Open a source of samples: a path under data.train or data.validation."""
        ...

    def num_samples(self, source: Any) -> int:
        """Number of samples in one pass over the source. Raises DataError if there are none."""
        ...

    def sample(self, source: Any, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """Build one sample: fields of a MicroBatch without the batch dimension.

        A pure function of its arguments. `draw` is keyed on (seed, number of the sample in the run), so that every
        epoch draws anew and neither layout nor resume changes the result.
        """
        ...

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        """Number of scored targets of each term, which the trainer sums over the step and divides by."""
        ...


@runtime_checkable
class RowObjective(Objective, Protocol):
    """An objective that learns from rows of a task (config/objectives.py: `rows`). Its classes inherit from it."""

    specials: Any
    """The special tokens that it was made with."""

    def too_long(self, example: Any) -> bool:
        """True if the row is longer than a sample, and will be cut."""
        ...

    def length(self, example: Any) -> int:
        """The data.seq_length that holds the whole row. Unless overridden, that of its first text."""
        return len(example.first)

    def teaches(self, example: Any) -> bool:
        """True if something is left to learn when the row is cut. Unless overridden, it always is."""
        return True


@runtime_checkable
class PackingObjective(Protocol):
    """An objective that can learn several rows in a sample."""

    def packed(self, source: Any) -> Any:
        """The same rows as a source of fewer samples."""
        ...


@runtime_checkable
class QuestionObjective(RowObjective, Protocol):
    """An objective whose rows have answers in words of their own, which a written one can be compared with."""

    def question(self, source: Any, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of what is asked in a row, and of the answer with the token that ends it."""
        ...


def stack_samples(samples: list[dict[str, np.ndarray]], numbers: np.ndarray, step: int) -> MicroBatch:
    """Stack samples into a microbatch, int64; what is not whole, float64."""
    fields: dict[str, Any] = {}
    for name in samples[0]:
        stacked = np.stack([sample[name] for sample in samples])
        dtype = np.float64 if np.issubdtype(stacked.dtype, np.floating) else np.int64
        fields[name] = torch.from_numpy(stacked.astype(dtype, copy=False))
    return MicroBatch(**fields, sample_ids=torch.from_numpy(np.array(numbers, dtype=np.int64)), step=step)


def find_documents(ids: Tensor) -> tuple[tuple[range, ...], ...] | None:
    """Runs of equal ids [B, S] of each sequence; None if an id of one comes back after another. Waits for a GPU."""
    found = []
    for row in ids.cpu().numpy():
        first = np.flatnonzero(np.diff(row, prepend=row[0] - 1))
        if len(np.unique(row[first])) < len(first):
            return None
        stops = [*first[1:].tolist(), len(row)]
        found.append(tuple(range(start, stop) for start, stop in zip(first.tolist(), stops)))
    return tuple(found)


def find_scored(targets: Tensor) -> Tensor:
    """int64 [N]: indices of the flattened targets other than IGNORE."""
    return torch.nonzero(targets.flatten() != IGNORE).squeeze(1)


def num_scored(targets: Tensor | None) -> int:
    """Number of targets other than IGNORE, counted on the host."""
    return int(np.count_nonzero(present(targets).cpu().numpy() != IGNORE))
