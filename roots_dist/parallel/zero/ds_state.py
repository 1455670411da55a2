"""Read and write master weights and moments in DeepSpeed's flat partitions: the work behind read_state and write_state.

There is one class per way in which DeepSpeed stores them. Moments exist from the start, so that reading needs no
previous step; frozen parameters have only a weight. Names with an underscore are DeepSpeed's; its version is pinned,
and tests/conformance moves states between stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from roots_dist.parallel.optim.groups import from_step_of, state_of
from roots_dist.parallel.zero.seam import STATE
from roots_dist.world.mesh import Axis
from roots_dist.world.sharding import Param


class Stage0State:
    """Stage 0: every data rank keeps everything, and a float32 model is its own master copy."""

    def __init__(self, optimizer: torch.optim.AdamW):
        self.optimizer = optimizer

    def read(self, param: Param) -> dict[str, Tensor]:
        return {key: part.detach().clone() for key, part in self._parts(param).items()}

    def write(self, param: Param, state: dict[str, Tensor]) -> None:
        for key, part in self._parts(param).items():
            part.copy_(state[key])

    def _parts(self, param: Param) -> dict[str, Tensor]:
        if not param.tensor.requires_grad:
            return {"weight": param.tensor}
        parts = {"weight": param.tensor, **state_of(self.optimizer, param.tensor)}
        return {key: parts[key] for key in STATE}

    def snapshot(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """State of each tensor, for the next engine, which has the same tensors."""
        return list(self.optimizer.state.items())

    def restore(self, snapshot: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        self.optimizer.state.update(snapshot)

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        for group in self.optimizer.param_groups:
            for tensor in group["params"]:
                state_of(self.optimizer, tensor)["step"].fill_(optimizer_steps[from_step_of(group)])


def _ds(param: Param) -> Any:
    """The parameter's tensor with the attributes that DeepSpeed has hung on it; torch's class declares none of them."""
    return param.tensor


class _FlatState:
    """Stages 1 to 3: each data rank keeps one flat tensor per group, with parts of the group's parameters."""

    def __init__(self, zero: Any, flats: list[Tensor]):
        self.zero, self.flats = zero, flats
        for flat in flats:
            state_of(zero.optimizer, flat)

    def snapshot(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Flat weights and state of each group in order, for the next engine."""
        return [(flat.detach(), self.zero.optimizer.state[flat]) for flat in self.flats]

    def restore(self, snapshot: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Copy the snapshot of an engine with fewer groups, which are the first groups of this one."""
        for flat, (values, state) in zip(self.flats, snapshot):
            flat.detach().copy_(values)
            for key, part in self.zero.optimizer.state[flat].items():  # in place: DeepSpeed's fragments point into them
                part.copy_(state[key])

    def _count(self, optimizer_steps: Mapping[int, int]) -> None:
        for flat, group in zip(self.flats, self.zero.optimizer.param_groups, strict=True):
            self.zero.optimizer.state[flat]["step"].fill_(optimizer_steps[from_step_of(group)])


class Stage12State(_FlatState):
    """Stages 1 and 2: the parameters of a group are concatenated, and each data rank keeps an equal part."""

    def __init__(self, zero: Any):
        super().__init__(zero, zero.single_partition_of_fp32_groups)
        zero._lazy_init_hp_params_optimizer_state()

    def read(self, param: Param) -> dict[str, Tensor]:
        if not param.tensor.requires_grad:
            return {"weight": param.tensor.detach().to(torch.float32, copy=True)}
        return {key: _ds(param).get_full_hp_param(_key(key)) for key in STATE}

    def write(self, param: Param, state: dict[str, Tensor]) -> None:
        if not param.tensor.requires_grad:
            param.tensor.copy_(state["weight"])
            return
        for key in STATE:
            _ds(param).set_full_hp_param(state[key], _key(key))

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        self._count(optimizer_steps)
        self.zero.update_lp_params()


class Stage3State(_FlatState):
    """Stage 3: each parameter is partitioned over data ranks on its own, with the last part padded."""

    def __init__(self, zero: Any, dp: Axis):
        super().__init__(zero, zero.fp32_partitioned_groups_flat)
        self.dp = dp

    def _part(self, param: Param, key: str) -> Tensor:
        part: Tensor = self.zero._get_fp32_opt_state_partition(param.tensor, False, _key(key))[0]
        return part

    def _parts(self, param: Param) -> dict[str, Tensor]:
        """Parts of this data rank, to be read and written."""
        if not param.tensor.requires_grad:
            return {"weight": _ds(param).ds_tensor.detach()}
        return {key: self._part(param, key).detach() for key in STATE}

    def read(self, param: Param) -> dict[str, Tensor]:
        return {key: self._whole(param, part.float()) for key, part in self._parts(param).items()}

    def _whole(self, param: Param, part: Tensor) -> Tensor:
        shape = param.spec.local_shape(param.tp)
        if self.dp.size == 1:
            return part[: _ds(param).ds_numel].view(shape).clone()
        whole = part.new_empty(part.numel() * self.dp.size)
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self.dp.group)
        return whole[: _ds(param).ds_numel].view(shape)

    def write(self, param: Param, state: dict[str, Tensor]) -> None:
        for key, part in self._parts(param).items():
            padded = F.pad(state[key].flatten(), (0, part.numel() * self.dp.size - state[key].numel()))
            part.copy_(padded.chunk(self.dp.size)[self.dp.rank])

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        self._count(optimizer_steps)
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)


def _key(key: str) -> str | None:
    return None if key == "weight" else key
