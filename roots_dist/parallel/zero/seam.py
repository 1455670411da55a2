"""The seam between the model and whoever shards it over data ranks. Two sides keep it: reference.py and engine.py.

    with engine.accumulate():            # backward passes add into .grad; leaving sums .grad over dp
        forwards, backwards, tied and partial sums
    engine.step(lr)                      # clip by the global norm, AdamW, weights

The loss is already divided by the step's global count, so gradients are summed over dp, not averaged. What does not
learn (parallel/optim/trainable.py) has requires_grad off, no gradient, no master copy and no moments; reach() lets more
of it learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from roots_dist.parallel.optim.trainable import Trainable

STATE = ("weight", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps for each parameter: the master weight and both Adam moments."""


@dataclass(frozen=True)
class Update:
    """What a step did. Equal on every rank."""

    grad_norm: float
    """Euclidean norm of the whole model's gradient before clipping. Not finite: the step was not taken."""
    by_group: Mapping[str, float]
    """The same of each of AdamW's groups (parallel/optim/groups.py); empty if it is not finite."""


class Engine(Protocol):
    module: nn.Module
    """The rank's stages, to be called in place of the module that was handed in."""
    trainable: Mapping[str, Trainable]
    """What will ever learn, of the whole model."""

    @property
    def optimizer_steps(self) -> Mapping[int, int]:
        """Border of a phase (a step of the run) that has been reached -> optimizer steps taken by what learns since
        then."""
        ...

    def unfreeze(self, step: int) -> None:
        """`step` steps of the run are done, and what is to learn since then joins. What learns already keeps its
        moments.

        Collective over the world, between steps; does nothing at most steps.
        """
        ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, backward passes add into `.grad` of this rank's slices; leaving sums them over dp. Collective over
        dp."""
        ...

    def step(self, lr: float) -> Update:
        """Clip, AdamW with decoupled decay, copy to the model's weights, clear gradients. Collective over the world."""
        ...

    def zero_grad(self) -> None:
        """Clear the gradients without a step; no optimizer state is touched."""
        ...

    def read_state(self, name: str) -> dict[str, Tensor]:
        """Master weight and moments (STATE) of one parameter, as whole as this rank's tensor slice, not cut over dp. Of
        one that does not learn now: the weight alone.

        Master dtype, on CPU or device; copies. Collective over dp: all data ranks ask for the same names in order.
        Works before the first step too (moments are zero).
        """
        ...

    def write_state(self, name: str, state: dict[str, Tensor]) -> None:
        """The reverse. After the last one, `finish_loading` makes the model's weights follow. Every dp rank calls
        it."""
        ...

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        """These optimizer steps have been taken: Adam's bias correction goes on from there. Collective over dp."""
        ...


def no_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The optimizer works in float32, or in float64 where the model does (proofs)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
