"""Parameter groups of the optimizer and their step, shared by both engines (zero/).

    [Param] + {name: Trainable} --groups_joining--> groups, with and without decay, each with its first step
        --> reference engine: update(), torch's AdamW as a function; DeepSpeed: adamw(), torch's AdamW as an object
        --> reference engine with a rule of an extension: own_update()

A group holds the parameters that are trained from the same step on with the same learning-rate scale, so that groups
that join later leave the earlier ones unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw as adamw_step

from roots_dist.config.optimizers import NewOptimizer, OptimizerStep
from roots_dist.config.sections import OptimConfig
from roots_dist.errors import present
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.world.sharding import Param

MOMENTS = ("exp_avg", "exp_avg_sq")


class Group(NamedTuple):
    """A parameter group: its first step and learning-rate scale, and whether weight decay applies."""

    trainable: Trainable
    decays: bool

    def __str__(self) -> str:
        """Name of the group where its gradient norm is shown."""
        return ("decayed" if self.decays else "no_decay") + (
            f"/step{self.trainable.from_step}" if self.trainable.from_step else ""
        )

    def adamw_options(self, optim: OptimConfig) -> dict[str, Any]:
        """Options of the group in torch's AdamW, and the group itself."""
        return {"group": self, "weight_decay": optim.weight_decay if self.decays else 0.0}


def groups_joining(trainable: Mapping[str, Trainable], from_step_of: int, until: int) -> list[Group]:
    """Groups whose training begins at steps since … until, in the same order on every rank; some ranks may hold no
    member."""
    found = sorted({l for l in trainable.values() if from_step_of <= l.from_step <= until})
    return [Group(l, decays) for l in found for decays in (True, False)]


def members(group: Group, params: list[Param], trainable: Mapping[str, Trainable]) -> list[Param]:
    """Parameters of the group. Norms and biases have no weight decay."""
    return [p for p in params if trainable.get(p.name) == group.trainable and p.decays == group.decays]


def norms_by_name(groups: Iterable[Group], norms: Iterable[float]) -> dict[str, float]:
    """Gradient norms by group name. Groups that differ only in their learning-rate scale are combined."""
    squares: dict[str, float] = {}
    for group, norm in zip(groups, norms, strict=True):
        squares[str(group)] = squares.get(str(group), 0.0) + norm * norm
    return {name: math.sqrt(square) for name, square in squares.items()}


def freeze(params: Sequence[Param]) -> None:
    """Freeze all parameters, before an engine is created. They have no gradient, and backward skips them."""
    for p in params:
        p.tensor.requires_grad_(False)


def adamw(optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay, Loshchilov & Hutter 2019) without groups. The learning rate is set before each
    step.

    Creating it imports torch._dynamo, which takes longer than the first steps of a small model; `update` does the same
    without the object.
    """
    optimizer = _AdamW([{"params": []}], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    optimizer.optim = optim
    optimizer.param_groups.clear()
    return optimizer


class _AdamW(torch.optim.AdamW):
    """The same bits for the same numbers, wherever a tensor ends: DeepSpeed cuts what it shards anywhere, and copies of
    a tied parameter otherwise on each stage. The kernel of a GPU computes all numbers alike anyway."""

    optim: OptimConfig

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no caller has a closure
        for options in self.param_groups:
            weights = [weight for weight in options["params"] if weight.grad is not None]
            group: Group = options["group"]
            as_set = group._replace(trainable=group.trainable._replace(scale=1.0))  # set_lr has scaled the rate
            step = exact_update if any(weight.device.type == "cpu" for weight in weights) else update
            if weights:
                step(self.optim, as_set, options["lr"], weights, [state_of(self, weight) for weight in weights])


def from_step_of(group: dict[str, Any]) -> int:
    """The step from which an optimizer's group is trained."""
    described: Group = group["group"]
    return described.trainable.from_step


def set_lr(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Set the learning rate of every group, scaled by the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["group"].trainable.scale


def initial_state(tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor before the first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
        "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
    }


def state_of(optimizer: torch.optim.AdamW, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor, initialized if the tensor has not been stepped yet."""
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        state.update(initial_state(tensor))
    return state


def update(optim: OptimConfig, group: Group, lr: float, weights: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    """One AdamW step of a group, from the gradients of `weights`; updates weights and states in place."""
    gradients = [present(weight.grad) for weight in weights]
    _step(optim, group, lr, [weights, gradients, *([state[key] for state in states] for key in MOMENTS)], states)


def own_update(
    rule: NewOptimizer,
    optim: OptimConfig,
    group: Group,
    lr: float,
    count: int,
    weights: list[Tensor],
    states: list[dict[str, Tensor]],
) -> None:
    """The same with the rule of an extension, tensor by tensor. `count`: number of this step of the group, from 1."""
    rate = lr * group.trainable.scale
    step = OptimizerStep(optim=optim, lr=rate, weight_decay=group.adamw_options(optim)["weight_decay"], count=count)
    for weight, state in zip(weights, states, strict=True):
        rule.update(step, weight, present(weight.grad), *(state[key] for key in MOMENTS))


UNIT = 16
"""Numbers that a CPU computes at once; what is left at the end of a tensor is computed one by one, and rounded
otherwise."""


def exact_update(
    optim: OptimConfig, group: Group, lr: float, weights: list[Tensor], states: list[dict[str, Tensor]]
) -> None:
    """The same with equal bits for equal numbers, wherever a tensor ends: ends are computed together, filled up."""
    gradients = [present(weight.grad) for weight in weights]
    rows = [weights, gradients, *([state[key] for state in states] for key in MOMENTS)]
    if all(weight.numel() % UNIT == 0 for weight in weights):  # no ends: as it stands, a view less of each tensor
        _step(optim, group, lr, rows, states)
        return
    flat = [[tensor.view(-1) for tensor in row] for row in rows]
    _step(optim, group, lr, [[t[: t.numel() // UNIT * UNIT] for t in row] for row in flat], states)
    ends = [[t[t.numel() // UNIT * UNIT :] for t in row] for row in flat]
    if sum(end.numel() for end in ends[0]):
        together = [torch.cat(row) for row in ends]
        filled = [F.pad(t, (0, -t.numel() % UNIT)) for t in together]
        _step(optim, group, lr, [[t] for t in filled], [{"step": states[0]["step"] - 1}])
        for t, row in zip(filled, ends):
            torch._foreach_copy_(row, list(t[: sum(end.numel() for end in row)].split([end.numel() for end in row])))


def _step(
    optim: OptimConfig, group: Group, lr: float, rows: Sequence[list[Tensor]], states: Sequence[Mapping[str, Tensor]]
) -> None:
    """rows: weights, gradients and both moments of some tensors."""
    weights, gradients, means, squares = rows
    adamw_step(
        weights,
        gradients,
        means,
        squares,
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=optim.beta1,
        beta2=optim.beta2,
        lr=lr * group.trainable.scale,
        weight_decay=group.adamw_options(optim)["weight_decay"],
        eps=optim.eps,
        maximize=False,
    )
