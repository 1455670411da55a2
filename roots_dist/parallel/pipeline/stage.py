"""A stage: the run of a model's pieces that one pipeline rank does between a receive and a send.

Knows nothing of what the pieces are: each maps a payload and a microbatch to a payload; some find terms of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roots_dist.world.batch import MicroBatch, PieceOutput


class Stage(nn.Module):
    """recompute: names of pieces whose activations are computed again in backward (all but their input is dropped).
    once: of pieces that have nothing to do where tokens go on from those before.

    Dropout needs nothing saved for that: its masks are functions of a key.
    """

    def __init__(
        self,
        names: Sequence[str],
        pieces: Sequence[nn.Module],
        recompute: frozenset[str] = frozenset(),
        prefill_only: frozenset[str] = frozenset(),
    ):
        super().__init__()
        self.names, self.pieces, self.recompute, self.prefill_only = (
            tuple(names),
            nn.ModuleList(pieces),
            recompute,
            prefill_only,
        )

    def forward(self, payload: dict[str, Tensor] | None, batch: MicroBatch) -> PieceOutput:
        """The payload for the next stage, and what the pieces of this one found (terms of the loss)."""
        found: tuple[Any, ...] = ()
        payload = payload or {}
        for name, piece in zip(self.names, self.pieces):
            if batch.has_past and name in self.prefill_only:
                continue
            if name in self.recompute and self.training:
                made = checkpoint(piece, payload, batch, use_reentrant=False, preserve_rng_state=False)
            else:
                made = piece(payload, batch)
            if isinstance(made, PieceOutput):
                found, made = found + made.found, made.payload
            payload = made
        return PieceOutput(found, payload)

    def named_pieces(self) -> list[tuple[str, nn.Module]]:
        return list(zip(self.names, self.pieces))
