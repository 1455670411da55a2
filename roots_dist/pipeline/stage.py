"""A stage: the run of a model's pieces that one pipeline rank does between a receive and a send.

Knows nothing of what the pieces are: each maps a payload to a payload; the last one returns terms of a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Stage(nn.Module):
    """recompute: names of pieces whose activations are computed again in backward (all but their input is dropped).

    Dropout needs nothing saved for that: its masks are functions of a key.
    """

    def __init__(self, names: Sequence[str], pieces: Sequence[nn.Module], recompute: frozenset[str] = frozenset()):
        super().__init__()
        self.names, self.pieces, self.recompute = tuple(names), nn.ModuleList(pieces), recompute

    def forward(self, payload: Any, batch: Any) -> Any:
        for name, piece in zip(self.names, self.pieces):
            if name in self.recompute and self.training:
                payload = checkpoint(piece, payload, batch, use_reentrant=False, preserve_rng_state=False)
            else:
                payload = piece(payload, batch)
        return payload

    def named_pieces(self) -> list[tuple[str, nn.Module]]:
        return list(zip(self.names, self.pieces))
