"""Incremental decoding with a KV cache, in any layout: each rank keeps the keys and values of its heads.

    texts --CachedDecoder.begin--> logits of the next token --next(token)--> logits of the one after …

A decoder-only model continues the texts. A decoder over an encoder (T5) starts a new text, and the encoder reads the
texts once. B texts, S positions of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roots_dist.assembly.passes import Passes
from roots_dist.world.batch import PADDING, KVCache, MicroBatch, find_documents
from roots_dist.world.mesh import Axis


class CachedDecoder:
    """Every rank of a replica makes one and calls its methods together.

    With `together`, all data ranks read the same texts, and data rank 0's model determines the result. ZeRO-3 needs
    this, because it gathers weights over data ranks; so does parallel.ep, which sends tokens between them. Otherwise
    each data rank reads its own texts.
    """

    def __init__(
        self, passes: Passes, texts: Sequence[Sequence[int]], start: int | None = None, *, together: bool = False
    ):
        """`texts` have at least one token each. `start` is the first token of a decoder over an encoder; None if there
        is no encoder."""
        assert all(texts), "an empty text has no next word"
        mesh = passes.mesh
        self._passes, self._start, self._cache = passes, start, KVCache()
        self._axis: Axis = mesh.world if together else mesh.model
        self._is_source = mesh.tp.rank == 0 and not (together and mesh.dp_cp.rank)
        length = max(map(len, texts))
        padding = torch.tensor([length - len(text) for text in texts], device=mesh.device)
        rows = [_padded(text, length, left=start is None) for text in texts]
        self._texts = torch.tensor(rows, device=mesh.device)
        self._padding = padding if any(len(text) < length for text in texts) else None
        """int64 [B]: padding before the text (decoder) or after it (encoder); None if no text has any."""

    @property
    def vocab(self) -> int:
        return self._passes.config.model.vocab

    def begin(self) -> Tensor | None:
        """float32 [B, V]: logits of the token after each text, on ranks that have the head; None on others."""
        if self._start is None:
            return self.next(self._texts)
        return self.next(torch.full_like(self._texts[:, :1], self._start))

    def next(self, new: Tensor) -> Tensor | None:
        """Append int64 [B, n] tokens to each text, and return the logits of the next token as `begin` does."""
        batch = self._batch(new.to(self._texts.device))
        with self._passes.model.tp.without_sequence_sharding():
            found = self._passes.forward([batch])
        self._cache.length += new.shape[1]
        return found[0] if found else None

    def select(self, rows: Tensor) -> None:
        """Continue with these rows: int64 [new B], in this order; a row may occur several times."""
        rows = rows.to(self._texts.device)
        self._cache.select(rows)
        self._texts = self._texts[rows]
        self._padding = None if self._padding is None else self._padding[rows]

    def broadcast(self, mine: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Value that the rank with the logits has computed, on all ranks, on the CPU. `mine` is None on other ranks."""
        return broadcast(self._axis, mine if self._is_source else None, shape, dtype, self._texts.device)

    def _batch(self, new: Tensor) -> MicroBatch:
        cache = self._cache
        samples = new.new_zeros(new.shape[0])
        if self._start is not None:
            place = torch.arange(self._texts.shape[1], device=new.device)
            documents = None if self._padding is None else _documents(place < (len(place) - self._padding).unsqueeze(1))
            return MicroBatch(
                tokens=self._texts,
                document_ids=documents,
                decoder_tokens=new,
                sample_ids=samples,
                logits_at=-1,
                cache=cache,
            )
        if self._padding is None:
            return MicroBatch(tokens=new, sample_ids=samples, logits_at=-1, cache=cache)
        place = torch.arange(cache.length + new.shape[1], device=new.device) - self._padding.unsqueeze(1)
        places, documents = place[:, cache.length :].clamp(min=0), _documents(place >= 0)
        return MicroBatch(
            tokens=new,
            document_ids=documents,
            document_ranges=find_documents(documents) if new.shape[1] > 1 else None,
            position_ids=places,
            sample_ids=samples,
            logits_at=-1,
            cache=cache,
        )


def broadcast(
    axis: Axis, mine: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Value of the one rank of the axis whose `mine` is not None, on all ranks, on the CPU. Collective over the
    axis."""
    value = torch.zeros(*shape, dtype=dtype, device=device)
    if mine is not None:
        value.copy_(mine)
    return axis.sum_(value).cpu()


def _padded(text: Sequence[int], length: int, left: bool) -> list[int]:
    """Pad the text with token 0, which is masked."""
    pad = [0] * (length - len(text))
    return [*pad, *text] if left else [*text, *pad]


def _documents(is_text: Tensor) -> Tensor:
    return torch.where(is_text, 0, PADDING)
