"""Tell all ranks what one of them has to say: the name of a tensor, or why it failed."""

from __future__ import annotations

import torch
import torch.distributed as dist

from roots_dist.world.mesh import Axis

MOST_BYTES = 2048
"""A longer text is cut, so that every rank knows the size of the message."""


def words_of(axis: Axis, rank: int, text: str, device: torch.device) -> str:
    """The text of one rank of the axis, the same on all. `rank` counts within the axis and is equal on all of its
    ranks; the text of any other rank is not read. Collective over the axis."""
    words = torch.zeros(MOST_BYTES, dtype=torch.uint8, device=device)
    if axis.rank == rank:
        said = text.encode(errors="backslashreplace")[:MOST_BYTES]
        words[: len(said)] = torch.tensor(list(said), dtype=torch.uint8, device=device)
    if axis.size > 1:
        dist.broadcast(words, src=axis.ranks[rank], group=axis.group)
    return bytes(words.tolist()).rstrip(b"\0").decode(errors="ignore")
