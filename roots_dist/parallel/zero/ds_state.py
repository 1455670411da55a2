"""Master weights and moments out of DeepSpeed's flat partitions, and into them: what read_state and write_state do.

One class per way in which DeepSpeed keeps them. Moments exist from the start, so that reading needs no step before;
what does not learn has its weight alone. The names with an underscore are DeepSpeed's; its version is pinned, and
tests/conformance moves states between stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from roots_dist.parallel.optim.groups import since, state_of
from roots_dist.parallel.zero.seam import STATE
from roots_dist.world.mesh import Axis
from roots_dist.world.sharding import Param


class WholeState:
    """Stage 0: every data rank keeps everything, and a float32 model is its own master."""

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

    def kept(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """For the engine that comes after this one, which has the same tensors."""
        return list(self.optimizer.state.items())

    def keep(self, kept: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        self.optimizer.state.update(kept)

    def finish(self, optimizer_steps: Mapping[int, int]) -> None:
        for group in self.optimizer.param_groups:
            for tensor in group["params"]:
                state_of(self.optimizer, tensor)["step"].fill_(optimizer_steps[since(group)])


def _ds(param: Param) -> Any:
    """The parameter's tensor with the attributes that DeepSpeed has hung on it; torch's class declares none of them."""
    return param.tensor


class _Flats:
    """Stages 1 to 3: each data rank keeps one flat tensor for each group, with the parts of its parameters."""

    def __init__(self, zero: Any, flats: list[Tensor]):
        self.zero, self.flats = zero, flats
        for flat in flats:
            state_of(zero.optimizer, flat)

    def kept(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Of each group in turn, for the engine that comes after this one."""
        return [(flat.detach(), self.zero.optimizer.state[flat]) for flat in self.flats]

    def keep(self, kept: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """What an engine of fewer groups has kept: they are the first of this one, and cut as there."""
        for flat, (values, state) in zip(self.flats, kept):
            flat.detach().copy_(values)
            for key, part in self.zero.optimizer.state[flat].items():  # in place: DeepSpeed's fragments point into them
                part.copy_(state[key])

    def _count(self, optimizer_steps: Mapping[int, int]) -> None:
        for flat, group in zip(self.flats, self.zero.optimizer.param_groups, strict=True):
            self.zero.optimizer.state[flat]["step"].fill_(optimizer_steps[since(group)])


class FlatState(_Flats):
    """Stages 1 and 2: the parameters of a group lie end to end, and each data rank keeps an equal run of them."""

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

    def finish(self, optimizer_steps: Mapping[int, int]) -> None:
        self._count(optimizer_steps)
        self.zero.update_lp_params()


class CutState(_Flats):
    """Stage 3: each parameter is cut over data ranks on its own, the last part padded."""

    def __init__(self, zero: Any, dp: Axis):
        super().__init__(zero, zero.fp32_partitioned_groups_flat)
        self.dp = dp

    def _part(self, param: Param, key: str) -> Tensor:
        part: Tensor = self.zero._get_fp32_opt_state_partition(param.tensor, False, _key(key))[0]
        return part

    def _parts(self, param: Param) -> dict[str, Tensor]:
        """Of this data rank, to be read and written."""
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

    def finish(self, optimizer_steps: Mapping[int, int]) -> None:
        self._count(optimizer_steps)
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)


def _key(key: str) -> str | None:
    return None if key == "weight" else key
