"""AdamW's groups, and their step. Both sides of the seam (zero/) use them.

    [Param] + phases.py's {name: Learned} --all_groups--> groups, decayed and not, each since its own step
        --> the reference: update(), torch's AdamW as a function; DeepSpeed: adamw(), torch's AdamW as an object

A group is what learns since the same step with the same share of the rate, so that what joins later changes nothing in
the groups before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_step

from roots_dist.config.schema import Optim
from roots_dist.errors import present
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.world.sharding import Param


class Group(NamedTuple):
    trainable: Trainable
    decays: bool

    def __str__(self) -> str:
        """As it is called where its gradient's norm is shown."""
        return ("decayed" if self.decays else "no_decay") + (
            f"/step{self.trainable.from_step}" if self.trainable.from_step else ""
        )

    def options(self, optim: Optim) -> dict[str, Any]:
        """As AdamW's own group has them, and which one it is."""
        return {"group": self, "weight_decay": optim.weight_decay if self.decays else 0.0}


def all_groups(trainable: Mapping[str, Trainable], since: int, until: int) -> list[Group]:
    """Those that begin to learn at steps since … until, in one order on every rank, some of which may hold none of
    them."""
    found = sorted({l for l in trainable.values() if since <= l.from_step <= until})
    return [Group(l, decays) for l in found for decays in (True, False)]


def members(group: Group, params: list[Param], trainable: Mapping[str, Trainable]) -> list[Param]:
    """No weight decay on norms and biases."""
    return [p for p in params if trainable.get(p.name) == group.trainable and p.decays == group.decays]


def by_name(groups: Iterable[Group], norms: Iterable[float]) -> dict[str, float]:
    """Norms by the names of groups. Those that differ in their share of the rate alone are one."""
    squares: dict[str, float] = {}
    for group, norm in zip(groups, norms, strict=True):
        squares[str(group)] = squares.get(str(group), 0.0) + norm * norm
    return {name: math.sqrt(square) for name, square in squares.items()}


def freeze(params: Sequence[Param]) -> None:
    """Before an engine is made: what does not learn has no gradient, and backward does not look for one."""
    for p in params:
        p.tensor.requires_grad_(False)


def adamw(optim: Optim) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019), without any group yet. The rate is set before each step.

    Making one imports torch._dynamo, which takes longer than a small model's first steps: where nobody asks for the
    object, `update` does the same.
    """
    optimizer = torch.optim.AdamW(
        [{"params": []}], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
    optimizer.param_groups.clear()
    return optimizer


def since(group: dict[str, Any]) -> int:
    """The step at which an optimizer's group began to learn."""
    described: Group = group["group"]
    return described.trainable.from_step


def set_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["group"].trainable.scale


def first_state(tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's own state of a tensor as it is before the first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
        "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
    }


def state_of(optimizer: torch.optim.AdamW, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's own state of a tensor, begun here where its first step has not yet been."""
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        state.update(first_state(tensor))
    return state


def update(optim: Optim, group: Group, lr: float, weights: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    """A step of AdamW on a group, from the gradients of `weights`; both they and their states change in place."""
    adamw_step(
        weights,
        [present(weight.grad) for weight in weights],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=optim.beta1,
        beta2=optim.beta2,
        lr=lr * group.trainable.scale,
        weight_decay=group.options(optim)["weight_decay"],
        eps=optim.eps,
        maximize=False,
    )
