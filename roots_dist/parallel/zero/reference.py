"""ZeRO 0 and 1 on one page: the meaning of the seam, in any dtype. engine.py is DeepSpeed; both pass one test suite.

    zero 0: gradients summed over dp, every data rank updates everything (plain data parallelism)
    zero 1: gradients reduce-scattered over dp, each data rank keeps and updates 1/dp of master weights and moments

Experts that are cut over ranks of dp (parallel.ep) have fewer ranks that hold the same: for them, dp is mesh.edp. It
also runs where there is nothing to shard. Memory is small: a float32 model is its own master copy, gradients are
reduced in place or parameter by parameter, and no gradient exists between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.parallel.optim.groups import (
    Group,
    freeze,
    groups_joining,
    initial_state,
    members,
    norms_by_name,
    update,
)
from roots_dist.parallel.optim.norm import clip_factor, group_norms, total_norm
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero.seam import STATE, Update, clear_gradients, master_dtype
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param, ensure_grad

BUCKET = 1 << 22
"""Number of elements of small gradients that are reduced together."""


@dataclass(frozen=True, eq=False)
class MasterParam:
    """A parameter, its master weight and its optimizer state on this rank."""

    param: Param
    master: Tensor
    """The parameter itself, or a copy in master dtype, or this data rank's part of such a copy, flat and padded."""
    state: dict[str, Tensor]
    """AdamW's state of the master weight."""
    dp: Axis
    """The ranks that hold the same parameter."""
    sharded: bool
    """Whether each of them has a part of master weight and state."""


class ReferenceEngine:
    """The engine protocol (seam.py) in plain PyTorch."""

    def __init__(
        self, config: Config, mesh: Mesh, module: nn.Module, params: Sequence[Param], trainable: Mapping[str, Trainable]
    ):
        self.module, self.config, self.mesh, self.trainable = module, config, mesh, trainable
        assert config.parallel.zero_stage <= 1 or mesh.dp_cp.size == 1, "the reference shards the optimizer only"
        self.params = {p.name: p for p in params}
        assert len(self.params) == len(params), "two parameters of one rank have the same name"
        self.masters: dict[str, MasterParam] = {}
        self.groups: list[tuple[Group, list[MasterParam]]] = []
        self.optimizer_steps: dict[int, int] = {}
        freeze(params)
        self.unfreeze(0)

    def unfreeze(self, step: int) -> None:
        for group in groups_joining(self.trainable, 1 + max(self.optimizer_steps, default=-1), step):
            group_params = members(group, list(self.params.values()), self.trainable)
            for p in group_params:
                p.tensor.requires_grad_(True)
                self.masters[p.name] = self._master_of(p)
            self.groups.append((group, [self.masters[p.name] for p in group_params]))
            self.optimizer_steps[group.trainable.from_step] = 0

    def _master_of(self, p: Param) -> MasterParam:
        dtype, dp = master_dtype(p.tensor.dtype), self.mesh.holders(p.spec.of_expert)
        sharded = self.config.parallel.zero_stage >= 1 and dp.size > 1
        if sharded:
            master = _part(p.tensor.detach().to(dtype), dp).clone()
        else:
            master = p.tensor if p.tensor.dtype == dtype else p.tensor.detach().to(dtype)
        return MasterParam(p, master, initial_state(master), dp, sharded)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield
        whole: dict[bool, list[Tensor]] = {False: [], True: []}
        for master_param in self.masters.values():
            gradient = ensure_grad(master_param.param)  # zeros if no microbatch used it: its moments decay as well
            if master_param.sharded:
                master_param.master.grad = _sum_and_cut(gradient, master_param.dp).to(master_param.master.dtype)
                master_param.param.tensor.grad = None
            else:
                whole[master_param.param.spec.of_expert].append(gradient)
        for of_expert, gradients in whole.items():
            _sum_in_place(gradients, self.mesh.holders(of_expert))

    @torch.no_grad()
    def step(self, lr: float, limit: float = math.inf) -> Update:
        norms = self._norms()
        norm = total_norm(norms)
        is_taken = math.isfinite(norm) and norm <= limit
        if is_taken:
            for master_param in self.masters.values():
                if master_param.master.grad is None:
                    master_param.master.grad = present(master_param.param.tensor.grad).to(master_param.master.dtype)
                    master_param.param.tensor.grad = None
            factor = clip_factor(norm, self.config.optim.clip_grad)
            if factor < 1 and self.masters:
                torch._foreach_mul_([present(h.master.grad) for h in self.masters.values()], factor)
            for group, group_params in self.groups:
                update(self.config.optim, group, lr, [h.master for h in group_params], [h.state for h in group_params])
            self.optimizer_steps = {
                from_step: optimizer_steps + 1 for from_step, optimizer_steps in self.optimizer_steps.items()
            }
            self._publish()
        self.zero_grad()
        return Update(norm, norms_by_name([group for group, _ in self.groups], norms) if is_taken else {})

    def _norms(self) -> list[float]:
        """Norm of each group. Where gradients are whole, ranks of ep have equal ones of all but their experts: the
        first one counts them."""
        sharded = self.config.parallel.zero_stage >= 1
        is_first = sharded or self.mesh.ep.rank == 0
        counted = [[h for h in group if is_first or h.param.spec.of_expert] for _, group in self.groups]
        everywhere = [self.mesh.model, self.mesh.dp_cp if sharded else self.mesh.ep]
        return group_norms([_gradients(group) for group in counted], everywhere, self.mesh.device)

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the master weights to the model's parameters."""
        for master_param in self.masters.values():
            if master_param.master is not master_param.param.tensor:
                whole = _whole(master_param, master_param.master, master_param.param.tensor.dtype)
                master_param.param.tensor.copy_(whole)

    def zero_grad(self) -> None:
        clear_gradients(self.module)
        for master_param in self.masters.values():
            master_param.master.grad = None

    @torch.no_grad()
    def read_state(self, name: str) -> dict[str, Tensor]:
        if name not in self.masters:
            tensor = self.params[name].tensor
            return {"weight": tensor.detach().to(master_dtype(tensor.dtype), copy=True)}
        master_param = self.masters[name]
        return {
            key: _whole(master_param, part.detach(), master_param.master.dtype).clone()
            for key, part in _parts(master_param).items()
        }

    @torch.no_grad()
    def write_state(self, name: str, state: dict[str, Tensor]) -> None:
        if name not in self.masters:
            self.params[name].tensor.copy_(state["weight"])
            return
        master_param = self.masters[name]
        for key, part in _parts(master_param).items():
            value = state[key].to(part)
            part.copy_(_part(value, master_param.dp) if master_param.sharded else value)

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        self.optimizer_steps = dict(optimizer_steps)
        for name, master_param in self.masters.items():
            master_param.state["step"].fill_(optimizer_steps[self.trainable[name].from_step])
        self._publish()


def _whole(master_param: MasterParam, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a parameter or one of its moments from all ranks that hold the same."""
    if not master_param.sharded:
        return part.to(dtype)
    whole = part.new_empty(part.numel() * master_param.dp.size, dtype=dtype)
    dist.all_gather_into_tensor(whole, part.to(dtype), group=master_param.dp.group)
    return whole[: master_param.param.tensor.numel()].view_as(master_param.param.tensor)


def _parts(master_param: MasterParam) -> dict[str, Tensor]:
    """The saved tensors of a parameter, by their names in STATE."""
    return {"weight": master_param.master, **{key: master_param.state[key] for key in STATE[1:]}}


def _gradients(group: Sequence[MasterParam]) -> Iterator[tuple[Param, Tensor]]:
    for master_param in group:
        gradient = master_param.master.grad if master_param.master.grad is not None else master_param.param.tensor.grad
        assert gradient is not None, f"{master_param.param.name} has no gradient: step() without accumulate()"
        yield master_param.param, gradient


def _padded(tensor: Tensor, dp: Axis) -> Tensor:
    """Flatten and pad to a multiple of the number of data ranks."""
    missing = -tensor.numel() % dp.size
    return F.pad(tensor.flatten(), (0, missing)) if missing else tensor.flatten()


def _part(tensor: Tensor, dp: Axis) -> Tensor:
    """This data rank's part of a tensor, flat and padded."""
    return _padded(tensor, dp).chunk(dp.size)[dp.rank]


def _sum_and_cut(gradient: Tensor, dp: Axis) -> Tensor:
    """This data rank's part of the sum over data ranks."""
    padded = _padded(gradient, dp)
    part = padded.new_empty(padded.numel() // dp.size)
    dist.reduce_scatter_tensor(part, padded, group=dp.group)
    return part


def _sum_in_place(gradients: list[Tensor], dp: Axis) -> None:
    """Sum over data ranks: large gradients in place, small ones in buckets, so that there are few messages."""
    if dp.size == 1:
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        if gradient.numel() >= BUCKET and gradient.is_contiguous():
            dp.sum_(gradient)
            continue
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= BUCKET:
            _sum_together(bucket, dp)
            bucket = []
    if bucket:
        _sum_together(bucket, dp)


def _sum_together(bucket: list[Tensor], dp: Axis) -> None:
    flat = dp.sum_(torch.cat([g.flatten() for g in bucket]))
    for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
        gradient.copy_(summed.view_as(gradient))
