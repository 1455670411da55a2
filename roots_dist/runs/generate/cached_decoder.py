"""A model that reads and is asked for its next word: in any layout, each rank keeping the keys and values of its heads.

    texts --Reader.begin--> logits of the next word --Reader.next(word)--> logits of the one after …

A decoder goes on with the texts; a decoder over an encoder (T5) begins anew, and the encoder reads the texts once.
B texts, S positions of the longest, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roots_dist.assembly.passes import Passes
from roots_dist.world.batch import PADDING, KVCache, MicroBatch
from roots_dist.world.mesh import Axis


class CachedDecoder:
    """Every rank of a replica makes one and calls its methods together.

    together: all data ranks read the same texts, and the first one's model says what comes next. A live run needs that
    (ZeRO-3 gathers weights over data ranks); elsewhere each data rank reads its own.
    """

    def __init__(
        self, passes: Passes, texts: Sequence[Sequence[int]], start: int | None = None, *, together: bool = False
    ):
        """texts: at least one token each. start: what a decoder over an encoder begins with; None: there is no
        encoder."""
        assert all(texts), "an empty text has no next word"
        mesh = passes.mesh
        self._passes, self._start, self._cache = passes, start, KVCache()
        self._axis: Axis = mesh.world if together else mesh.model
        self._speaks = mesh.tp.rank == 0 and not (together and mesh.dp.rank)
        length = max(map(len, texts))
        lacking = torch.tensor([length - len(text) for text in texts], device=mesh.device)
        rows = [_filled(text, length, left=start is None) for text in texts]
        self._texts = torch.tensor(rows, device=mesh.device)
        self._lacking = lacking if any(len(text) < length for text in texts) else None
        """int64 [B]: padding, before the text (a decoder's) or after it (an encoder's); None where no text has any."""

    @property
    def vocab(self) -> int:
        return self._passes.config.model.vocab

    def begin(self) -> Tensor | None:
        """float32 [B, V]: logits of the word after each text, on ranks that have the head; None on others."""
        if self._start is None:
            return self.next(self._texts)
        return self.next(torch.full_like(self._texts[:, :1], self._start))

    def next(self, new: Tensor) -> Tensor | None:
        """Read int64 [B, n] more of each, and say what comes after. As `begin`."""
        batch = self._batch(new.to(self._texts.device))
        with self._passes.model.tp.without_sequence_parallel():
            found = self._passes.forward([batch])
        self._cache.length += new.shape[1]
        return found[0] if found else None

    def select(self, rows: Tensor) -> None:
        """Go on with these of the texts: int64 [new B], in this order, some perhaps several times."""
        rows = rows.to(self._texts.device)
        self._cache.select(rows)
        self._texts = self._texts[rows]
        self._lacking = None if self._lacking is None else self._lacking[rows]

    def broadcast(self, mine: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the rank made of the logits that has them (or the first of those ranks), on all ranks, on the CPU. mine:
        None on the ranks that have none."""
        return broadcast(self._axis, mine if self._speaks else None, shape, dtype, self._texts.device)

    def _batch(self, new: Tensor) -> MicroBatch:
        cache = self._cache
        samples = new.new_zeros(new.shape[0])
        if self._start is not None:
            place = torch.arange(self._texts.shape[1], device=new.device)
            documents = None if self._lacking is None else _documents(place < (len(place) - self._lacking).unsqueeze(1))
            return MicroBatch(
                tokens=self._texts,
                document_ids=documents,
                decoder_tokens=new,
                sample_ids=samples,
                logits_at=-1,
                cache=cache,
            )
        if self._lacking is None:
            return MicroBatch(tokens=new, sample_ids=samples, logits_at=-1, cache=cache)
        place = torch.arange(cache.length + new.shape[1], device=new.device) - self._lacking.unsqueeze(1)
        places = place[:, cache.length :].clamp(min=0)
        return MicroBatch(
            tokens=new,
            document_ids=_documents(place >= 0),
            position_ids=places,
            sample_ids=samples,
            logits_at=-1,
            cache=cache,
        )


def broadcast(
    axis: Axis, mine: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What one rank of the axis knows (all others have None), on all of them, on the CPU. Collective over the axis."""
    told = torch.zeros(*shape, dtype=dtype, device=device)
    if mine is not None:
        told.copy_(mine)
    return axis.sum_(told).cpu()


def _filled(text: Sequence[int], length: int, left: bool) -> list[int]:
    """With any words, which nobody sees."""
    filling = [0] * (length - len(text))
    return [*filling, *text] if left else [*text, *filling]


def _documents(is_text: Tensor) -> Tensor:
    return torch.where(is_text, 0, PADDING)
