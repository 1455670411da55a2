"""The experts that one run has chosen, given to another: what a comparison of two dtypes then sees is arithmetic.

    float64 run --each choice is noted--> Choices --taken in the place of its own--> bf16 run, which counts how many it
                                                                                    would have made otherwise

Where two scores at the border of a choice differ by less than rounding does, another dtype, or another layout, sends a
token to another expert. Its output jumps, and so do the gradients of both experts, by more than any bound on rounding.
B sequences, S positions of each, K experts of a token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.learning.models.experts import Experts, Router
from roots_dist.learning.models.router_terms import Routing
from roots_dist.testing.parity import Difference
from roots_dist.world.batch import MicroBatch

Choices = Mapping[str, Mapping[int, np.ndarray]]
"""Layer -> number of a sample -> int64 [S, K]: the experts of each position, ascending."""
DEVIATIONS = 5
"""Standard deviations that the numbers of differing choices of two runs may lie apart."""


@dataclass
class Chooser:
    """Stands beside the routers of a rank in training: takes the choices that are known, and notes all others."""

    known: Choices
    noted: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    made: int = 0
    """Choices that were known."""
    differing: int = 0
    """Number of choices that the router would have made otherwise."""

    def watch(self, module: nn.Module) -> None:
        """Stand beside every router in a rank's stages."""
        for layer in module.modules():
            if isinstance(layer, Experts):
                _Beside(self, layer)

    def choose(self, layer: Experts, batch: MicroBatch, chosen: Tensor) -> Tensor | None:
        """int64 [B, S, K]: the experts of this rank's positions in the place of those that its router has chosen; None
        if these are not known, and have been noted."""
        samples = batch.sample_ids.tolist()
        if layer.name not in self.known:
            self.noted[layer.name] |= zip(samples, chosen.cpu().unbind())
            return None
        whole = torch.from_numpy(np.stack([self.known[layer.name][sample] for sample in samples]))
        known = layer.tp.of_context(whole.to(chosen.device))
        if layer.tp.rank == 0:  # every tensor rank chooses alike
            self.made += known.numel()
            self.differing += int((chosen.unsqueeze(-1) != known.unsqueeze(-2)).all(-1).sum())
        return known

    def found(self) -> dict[str, Any]:
        """Report of this rank on the choices."""
        return {"noted": dict(self.noted), "made": self.made, "differing": self.differing}


class _Beside:
    """Hooks beside the router of one layer."""

    def __init__(self, chooser: Chooser, layer: Experts) -> None:
        self._chooser, self._layer = chooser, layer
        self._batch: MicroBatch | None = None
        layer.register_forward_pre_hook(self._before)
        layer.router.register_forward_hook(self._after)

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._batch = args[1]

    def _after(self, router: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing | None:
        tokens, chosen_before = args
        if not self._layer.training or chosen_before is not None:  # recomputation takes the choice that was taken
            return None
        batch = present(self._batch)
        known = self._chooser.choose(self._layer, batch, routing.chosen.unflatten(0, (len(batch.sample_ids), -1)))
        if known is None:
            return None
        assert isinstance(router, Router)
        return router.forward(tokens, known.flatten(0, 1))


def choices_of(ranks: Sequence[Mapping[str, Any]]) -> Choices:
    """Choices that one process has noted in its run."""
    (alone,) = ranks
    return {layer: {n: each.numpy() for n, each in noted.items()} for layer, noted in alone["noted"].items()}


@dataclass
class Counted:
    """Choices of a layout and of one process that rounding would have changed."""

    made: int = 0
    in_layout: int = 0
    alone: int = 0

    def add(self, layout: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> None:
        """Add what the ranks of two runs have found. Raises AssertionError if one met other samples than the other."""
        made = [sum(rank["made"] for rank in ranks) for ranks in (layout, alone)]
        assert made[0] == made[1], f"choices of {made[0]} and {made[1]} experts were known to the two runs"
        self.made += made[0]
        self.in_layout += sum(rank["differing"] for rank in layout)
        self.alone += sum(rank["differing"] for rank in alone)

    def row(self) -> Difference:
        """Compare the choices that differ: rounding changes about as many in a layout as in one process, and a bug in
        the layout's scores changes more."""
        if not self.made:
            return Difference("choices of experts", math.inf, 0.0, "nothing to compare")
        spread = math.sqrt(self.in_layout + self.alone + 1)
        bound = (self.alone + DEVIATIONS * spread) / self.made
        return Difference("choices of experts", self.in_layout / self.made, bound, "their share that differs")

    def note(self) -> str:
        """Summary of the choices, in one line."""
        return (
            f"experts are those that the float64 run chose: of {self.made:,} choices bf16 would have made "
            f"{self.in_layout:,} otherwise in this layout, {self.alone:,} in one process"
        )
