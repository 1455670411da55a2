"""AdamW's groups and the optimizer made of them. Both sides of the seam (zero/) use them.

    [Param] + phases.py's {name: Learned} --group_of--> groups, decayed and not, each since its own step --> torch.optim.AdamW

A group is what learns since the same step with the same share of the rate, so that what joins later changes nothing in the
groups before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roots_dist.config.schema import Optim
from roots_dist.optim.phases import Learned
from roots_dist.sharding import Param


class Group(NamedTuple):
    learned: Learned
    decays: bool

    def __str__(self) -> str:
        """As it is called where its gradient's norm is shown."""
        return ("decayed" if self.decays else "undecayed") + (f"/step{self.learned.from_step}" if self.learned.from_step else "")

    def options(self, optim: Optim) -> dict[str, Any]:
        """As AdamW's own group has them, and which one it is."""
        return {"group": self, "weight_decay": optim.weight_decay if self.decays else 0.0}


def all_groups(learned: Mapping[str, Learned], since: int, until: int) -> list[Group]:
    """Those that begin to learn at steps since … until, in one order on every rank, some of which may hold none of them."""
    found = sorted({l for l in learned.values() if since <= l.from_step <= until})
    return [Group(l, decays) for l in found for decays in (True, False)]


def members(group: Group, params: list[Param], learned: Mapping[str, Learned]) -> list[Param]:
    """No weight decay on norms and biases."""
    return [p for p in params if learned.get(p.name) == group.learned and p.decays == group.decays]


def by_name(groups: Iterable[Group], norms: Iterable[float]) -> dict[str, float]:
    """Norms by the names of groups. Those that differ in their share of the rate alone are one."""
    squares: dict[str, float] = {}
    for group, norm in zip(groups, norms, strict=True):
        squares[str(group)] = squares.get(str(group), 0.0) + norm * norm
    return {name: math.sqrt(square) for name, square in squares.items()}


def freeze(params: list[Param]) -> None:
    """Before an engine is made: what does not learn has no gradient, and backward does not look for one."""
    for p in params:
        p.tensor.requires_grad_(False)


def adamw(optim: Optim) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019), without any group yet. The rate is set before each step."""
    optimizer = torch.optim.AdamW(
        [{"params": []}], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
    optimizer.param_groups.clear()
    return optimizer


def since(group: dict[str, Any]) -> int:
    """The step at which an optimizer's group began to learn."""
    return group["group"].learned.from_step


def set_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["group"].learned.scale


def state_of(optimizer: torch.optim.AdamW, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's own state of a tensor, begun with zeros as AdamW itself would at the first step."""
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state
