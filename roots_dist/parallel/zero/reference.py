"""ZeRO 0 and 1 in one page: what the seam means, in any dtype. engine.py is DeepSpeed; both pass one suite.

    zero 0: gradients summed over dp, every data rank updates everything (plain data parallelism)
    zero 1: gradients summed and cut over dp, each data rank keeps and updates 1/dp of the master weights and moments

Also what runs where there is nothing to shard. It holds little: a float32 model is its own master, gradients are
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
from roots_dist.parallel.optim.groups import Group, all_groups, by_name, first_state, freeze, members, update
from roots_dist.parallel.optim.norm import clip_factor, group_norms, norm_of
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero.seam import STATE, Update, master_dtype, no_gradients
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param, gradient_of

BUCKET = 1 << 22
"""Elements of small gradients that travel together."""


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter and what the optimizer keeps of it on this rank."""

    param: Param
    master: Tensor
    """The parameter itself; or a copy in master dtype; or this data rank's part of such a copy, flat and padded."""
    state: dict[str, Tensor]
    """AdamW's, of the master."""


class ReferenceEngine:
    def __init__(
        self, config: Config, mesh: Mesh, module: nn.Module, params: Sequence[Param], trainable: Mapping[str, Trainable]
    ):
        self.module, self.config, self.mesh, self.trainable = module, config, mesh, trainable
        assert config.parallel.zero_stage <= 1 or mesh.dp.size == 1, "the reference shards the optimizer only"
        self.sharded = config.parallel.zero_stage >= 1 and mesh.dp.size > 1
        self.params = {p.name: p for p in params}
        assert len(self.params) == len(params), "two parameters of one rank bear the same name"
        self.held: dict[str, Held] = {}
        self.groups: list[tuple[Group, list[Held]]] = []
        self.optimizer_steps: dict[int, int] = {}
        freeze(params)
        self.unfreeze(0)

    def unfreeze(self, step: int) -> None:
        for group in all_groups(self.trainable, 1 + max(self.optimizer_steps, default=-1), step):
            found = members(group, list(self.params.values()), self.trainable)
            for p in found:
                p.tensor.requires_grad_(True)
                master = self._master(p.tensor)
                self.held[p.name] = Held(p, master, first_state(master))
            self.groups.append((group, [self.held[p.name] for p in found]))
            self.optimizer_steps[group.trainable.from_step] = 0

    def _master(self, tensor: nn.Parameter) -> Tensor:
        dtype = master_dtype(tensor.dtype)
        if self.sharded:
            return _part(tensor.detach().to(dtype), self.mesh.dp).clone()
        return tensor if tensor.dtype == dtype else tensor.detach().to(dtype)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield
        whole = []
        for held in self.held.values():
            gradient = gradient_of(held.param)  # zeros if no microbatch used it: its moments decay all the same
            if self.sharded:
                held.master.grad = _sum_and_cut(gradient, self.mesh.dp).to(held.master.dtype)
                held.param.tensor.grad = None
            else:
                whole.append(gradient)
        if not self.sharded:
            _sum_in_place(whole, self.mesh.dp)

    @torch.no_grad()
    def step(self, lr: float) -> Update:
        everywhere = [self.mesh.model, self.mesh.dp] if self.sharded else [self.mesh.model]
        norms = group_norms([_gradients(held) for _, held in self.groups], everywhere, self.mesh.device)
        norm = norm_of(norms)
        if math.isfinite(norm):
            for held in self.held.values():
                if held.master.grad is None:
                    held.master.grad = present(held.param.tensor.grad).to(held.master.dtype)
                    held.param.tensor.grad = None
            factor = clip_factor(norm, self.config.optim.clip_grad)
            if factor < 1 and self.held:
                torch._foreach_mul_([present(h.master.grad) for h in self.held.values()], factor)
            for group, found in self.groups:
                update(self.config.optim, group, lr, [h.master for h in found], [h.state for h in found])
            self.optimizer_steps = {
                border: optimizer_steps + 1 for border, optimizer_steps in self.optimizer_steps.items()
            }
            self._publish()
        self.zero_grad()
        return Update(norm, by_name([group for group, _ in self.groups], norms) if math.isfinite(norm) else {})

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the master weights to the model's."""
        for held in self.held.values():
            if held.master is not held.param.tensor:
                held.param.tensor.copy_(self._whole(held.master, held.param, held.param.tensor.dtype))

    def _whole(self, part: Tensor, param: Param, dtype: torch.dtype) -> Tensor:
        """A parameter, or one of its moments, put together from all data ranks."""
        if not self.sharded:
            return part.to(dtype)
        whole = part.new_empty(part.numel() * self.mesh.dp.size, dtype=dtype)
        dist.all_gather_into_tensor(whole, part.to(dtype), group=self.mesh.dp.group)
        return whole[: param.tensor.numel()].view_as(param.tensor)

    def zero_grad(self) -> None:
        no_gradients(self.module)
        for held in self.held.values():
            held.master.grad = None

    @torch.no_grad()
    def read_state(self, name: str) -> dict[str, Tensor]:
        if name not in self.held:
            tensor = self.params[name].tensor
            return {"weight": tensor.detach().to(master_dtype(tensor.dtype), copy=True)}
        held = self.held[name]
        return {
            key: self._whole(part.detach(), held.param, held.master.dtype).clone() for key, part in _parts(held).items()
        }

    @torch.no_grad()
    def write_state(self, name: str, state: dict[str, Tensor]) -> None:
        if name not in self.held:
            self.params[name].tensor.copy_(state["weight"])
            return
        for key, part in _parts(self.held[name]).items():
            value = state[key].to(part)
            part.copy_(_part(value, self.mesh.dp) if self.sharded else value)

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        self.optimizer_steps = dict(optimizer_steps)
        for name, held in self.held.items():
            held.state["step"].fill_(optimizer_steps[self.trainable[name].from_step])
        self._publish()


def _parts(held: Held) -> dict[str, Tensor]:
    """What is saved of it, by its name in STATE."""
    return {"weight": held.master, **{key: held.state[key] for key in STATE[1:]}}


def _gradients(group: Sequence[Held]) -> Iterator[tuple[Param, Tensor]]:
    for held in group:
        gradient = held.master.grad if held.master.grad is not None else held.param.tensor.grad
        assert gradient is not None, f"{held.param.name} has no gradient: step() without accumulate()"
        yield held.param, gradient


def _padded(tensor: Tensor, dp: Axis) -> Tensor:
    """Flat, and as long as the next multiple of the number of data ranks."""
    missing = -tensor.numel() % dp.size
    return F.pad(tensor.flatten(), (0, missing)) if missing else tensor.flatten()


def _part(tensor: Tensor, dp: Axis) -> Tensor:
    return _padded(tensor, dp).chunk(dp.size)[dp.rank]


def _sum_and_cut(gradient: Tensor, dp: Axis) -> Tensor:
    """This data rank's part of the sum over data ranks."""
    padded = _padded(gradient, dp)
    part = padded.new_empty(padded.numel() // dp.size)
    dist.reduce_scatter_tensor(part, padded, group=dp.group)
    return part


def _sum_in_place(gradients: list[Tensor], dp: Axis) -> None:
    """Sum over data ranks: large gradients where they are, small ones together, so that messages are few."""
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
