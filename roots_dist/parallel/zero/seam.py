"""The seam between the model and the engine that shards it over data ranks, implemented by reference.py and engine.py.

    with engine.accumulate():            # leaving it sums gradients over all ranks that have a part of them
        forward, backward
    engine.step(lr)                      # clip by the global norm, AdamW, copy to the model's weights

The loss is already divided by the step's global count, so gradients are summed over dp, not averaged. In this room dp
is mesh.dp_cp: context ranks hold the same parameters, and have gradients from other positions, as data ranks have.
Frozen parameters (parallel/optim/trainable.py) have requires_grad off, no gradient, no master copy and no moments;
unfreeze() trains more of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.world.sharding import ParamTensor

STATE = ("weight", "exp_avg", "exp_avg_sq")
"""Optimizer state of each parameter: the master weight and both Adam moments."""


@dataclass(frozen=True)
class Update:
    """Result of a step. Equal on every rank."""

    grad_norm: float
    """Euclidean norm of the whole model's gradient before clipping. If it is not finite, or above the limit, the step
    was not taken."""
    by_group: Mapping[str, float]
    """Gradient norm of each parameter group (parallel/optim/groups.py); empty if the step was not taken."""


class Engine(Protocol):
    """Shards gradients, optimizer state and weights over data ranks, and steps the optimizer."""

    module: nn.Module
    """The rank's stages, to be called instead of the module that was passed in."""
    trainable: Mapping[str, Trainable]
    """Trainable parameters of the whole model, including those that are still frozen."""
    on_gradients: Callable[[Iterable[ParamTensor]], None] | None
    """Function called once per step with the gradient of each parameter, in its shape, if set: the sum of these over dp
    is the gradient of the step. Used by proofs."""

    @property
    def optimizer_steps(self) -> Mapping[int, int]:
        """First step of each group that is trained by now (a step of the run) -> optimizer steps taken since then."""
        ...

    def unfreeze(self, step: int) -> None:
        """Train the parameters that join after `step` steps of the run. Parameters that are already trained keep their
        moments.

        Collective over the world, between steps; does nothing at most steps.
        """
        ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Let backward passes of the body compute gradients, which are summed at its end: over dp, over the pipeline
        ranks that hold the same parameter, and over the tensor ranks that hold a part of its gradient. Collective over
        these; the sum over dp may run while backward passes go on."""
        ...

    def local_norms(self) -> list[ParamTensor]:
        """The norm of each gradient of the last `accumulate` on this rank alone, before a nan has spread: scalars."""
        ...

    def weights(self) -> list[ParamTensor]:
        """The part of each parameter that this rank holds between steps, in the model's dtype."""
        ...

    def squared_norms(self) -> Tensor | None:
        """float64 [groups]: the square of the norm of each group's gradient, as far as this rank counts it, so that the
        sum over the world is that of the model. For a message and a read that carry other numbers of the step too;
        None if `step` has to take the norms itself. Between `accumulate` and `step`."""
        ...

    def step(self, lr: float, limit: float = math.inf, squares: Sequence[float] | None = None) -> Update:
        """Clip, AdamW with decoupled decay, copy to the model's weights, clear the gradients. If the norm is above
        `limit`, the gradients are only cleared. squares: `squared_norms` summed over the world; if None, the norms are
        summed and read here. Collective over the world."""
        ...

    def zero_grad(self) -> None:
        """Clear the gradients without a step; optimizer state is unchanged."""
        ...

    def read_state(self, name: str, *, copy: bool = True) -> dict[str, Tensor]:
        """Master weight and moments (STATE) of one parameter: whole over dp, this rank's slice over tp. Frozen
        parameters have only a weight.

        Copies in master dtype, on CPU or device; without `copy` they may be the engine's own, for a caller who does not
        change them and is done before the next step. Collective over dp: all data ranks ask for the same names in the
        same order. Also valid before the first step (moments are zero).
        """
        ...

    def write_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Set what read_state returns. Afterwards `finish_loading` updates the model's weights. Every data rank calls
        it."""
        ...

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        """Set the number of optimizer steps taken, from which Adam's bias correction continues, and update the model's
        weights. Collective over dp."""
        ...


def clear_gradients(module: nn.Module) -> None:
    """Set every gradient to None."""
    for parameter in module.parameters():
        parameter.grad = None


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The optimizer works in float32, or in float64 if the model does (proofs)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
