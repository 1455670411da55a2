"""Optimizer rules: how a step changes a weight and what is kept of its gradients. No torch.

    optim.optimizer --> adamw, or a rule of an extension --parallel/optim/groups.py--> weights, exp_avg, exp_avg_sq

A rule is elementwise: a rank applies it to the part of each tensor that it holds, which under ZeRO is a flat one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class OptimizerSettings(Protocol):
    """The keys of `optim` in config/schema.py that a rule may read; the section imports this table."""

    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """The hyperparameters of one step of a tensor, for an optimizer rule."""

    optim: OptimizerSettings
    lr: float
    """The learning rate of this step and this tensor."""
    weight_decay: float
    """optim.weight_decay, and 0 for norms and biases."""
    count: int
    """Number of this step of the tensor, from 1."""


Rule = Callable[[OptimizerStep, Any, Any, Any, Any], None]
"""(step, weight, gradient, exp_avg, exp_avg_sq): changes the weight and both tensors of state in place. The state is
zero before the first step, and what it means is the rule's own affair. All have one shape and the dtype of master
weights; the gradient is the whole batch's, clipped."""


@dataclass(frozen=True, kw_only=True)
class NewOptimizer:
    """An optimizer rule of one's own."""

    update: Rule
    reads: frozenset[str] = frozenset()
    """Keys of READ that it reads. A key that it does not read is refused."""


READ = frozenset({"beta1", "beta2", "eps", "weight_decay"})
"""Keys of optim that a rule may read beside lr, and all that AdamW reads."""
OPTIMIZERS = {"adamw": READ}
"""The package's own values of `optim.optimizer` -> the keys of optim that each reads."""
