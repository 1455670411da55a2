"""A stage: the pieces of a model that one pipeline rank computes between a receive and a send.

Knows nothing of what the pieces are: each maps a payload and a microbatch to a payload, and some compute terms of the
loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roots_dist.parallel.tensor.deferred import DeferredWeightGrads
from roots_dist.schedule.actions import Action
from roots_dist.world.batch import MicroBatch, PieceOutput


class StagePass(NamedTuple):
    """A forward or backward pass of a stage, as the executor is about to run it, or has run it."""

    action: Action
    is_last: bool
    """True if no later pass of the step adds to the gradients of the stage's weights."""
    following: Action | None
    """The next pass of this rank that needs weights; None after the last."""
    deferred: DeferredWeightGrads


class PieceHooks(Protocol):
    """Hooks around the passes of pieces: an engine (zero/) gathers their weights and sums their gradients."""

    def before(self, started: StagePass) -> None:
        """Called before a stage's pass."""
        ...

    def after(self, ended: StagePass) -> None:
        """Called after it."""
        ...

    def enter(self, piece: nn.Module, payload: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called before a piece's forward; what is returned goes in."""
        ...

    def leave(self, piece: nn.Module, output: Any) -> Any:
        """Called after it, with the payload or PieceOutput; what is returned goes on."""
        ...


class Stage(nn.Module):
    """A sequence of pieces.

    recompute: names of the pieces whose activations are recomputed in backward (only their input is saved).
    prefill_only: names of the pieces that are skipped when the cache holds preceding tokens. Recomputation saves no
    random state: dropout masks are functions of a key.
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
        self.hooks: PieceHooks | None = None

    def forward(self, payload: dict[str, Tensor] | None, batch: MicroBatch) -> PieceOutput:
        """Return the payload for the next stage, and the results of this stage's pieces (terms of the loss)."""
        results: tuple[Any, ...] = ()
        payload = payload or {}
        for name, piece in zip(self.names, self.pieces):
            if batch.has_past and name in self.prefill_only:
                continue
            if self.hooks is not None:
                payload = self.hooks.enter(piece, payload)
            if name in self.recompute and self.training:
                again = replace(batch, chosen_experts={})
                output = checkpoint(piece, payload, again, use_reentrant=False, preserve_rng_state=False)
            else:
                output = piece(payload, batch)
            if self.hooks is not None:
                output = self.hooks.leave(piece, output)
            if isinstance(output, PieceOutput):
                results, output = results + output.results, output.payload
            payload = output
        return PieceOutput(results, payload)

    def named_pieces(self) -> list[tuple[str, nn.Module]]:
        return list(zip(self.names, self.pieces))
