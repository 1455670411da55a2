"""AdamW's two groups, decayed and not, and the optimizer made of them. Both sides of the seam (zero/) use them.

    [Param] --by shape--> decay | no decay --adamw--> torch.optim.AdamW
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roots_dist.config.schema import Optim
from roots_dist.sharding import Param


def groups(params: Sequence[Param], tensors: Sequence[Tensor], optim: Optim) -> list[dict[str, Any]]:
    """Two groups of `tensors`, each of which stands for the param at its place. No weight decay on norms and biases.

    Every rank has both: DeepSpeed adds up the norm group by group, in one collective each. A stage holds at least a
    block, and a block has matrices and norms.
    """
    pairs = list(zip(params, tensors, strict=True))
    found = [
        {"params": [t for p, t in pairs if p.decays], "weight_decay": optim.weight_decay},
        {"params": [t for p, t in pairs if not p.decays], "weight_decay": 0.0},
    ]
    assert all(group["params"] for group in found), "a rank's stages need a matrix and a vector among their parameters"
    return found


def adamw(found: list[dict[str, Any]], optim: Optim) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019). The learning rate is set before each step."""
    return torch.optim.AdamW(found, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def set_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_of(optimizer: torch.optim.AdamW, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's own state of a tensor, begun with zeros as AdamW itself would at the first step."""
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state
