"""Master weights and moments out of DeepSpeed's flat partitions, and into them: what read_state and write_state do.

One class per way in which DeepSpeed keeps them. Moments exist from the start, so that reading needs no step before.
The names with an underscore are DeepSpeed's; its version is pinned, and tests/conformance moves states between stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from roots_dist.mesh import Axis
from roots_dist.optim.groups import state_of
from roots_dist.sharding import Param
from roots_dist.zero.seam import STATE


class WholeState:
    """Stage 0: every data rank keeps everything, and a float32 model is its own master."""

    def __init__(self, optimizer: torch.optim.AdamW, params: Sequence[Param]):
        self.optimizer, self.tensors = optimizer, [p.tensor for p in params]

    def read(self, param: Param) -> dict[str, Tensor]:
        return {key: part.detach().clone() for key, part in self._parts(param).items()}

    def write(self, param: Param, state: dict[str, Tensor]) -> None:
        for key, part in self._parts(param).items():
            part.copy_(state[key])

    def _parts(self, param: Param) -> dict[str, Tensor]:
        parts = {"weight": param.tensor, **state_of(self.optimizer, param.tensor)}
        return {key: parts[key] for key in STATE}

    def finish(self, step: int) -> None:
        for tensor in self.tensors:
            state_of(self.optimizer, tensor)["step"].fill_(step)


class FlatState:
    """Stages 1 and 2: the parameters of a group lie end to end, and each data rank keeps an equal run of them."""

    def __init__(self, optimizer: Any):
        self.zero = optimizer
        for flat in self._flats():
            state_of(self.zero.optimizer, flat)
        self.zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def read(self, param: Param) -> dict[str, Tensor]:
        return {key: param.tensor.get_full_hp_param(_key(key)) for key in STATE}

    def write(self, param: Param, state: dict[str, Tensor]) -> None:
        for key in STATE:
            param.tensor.set_full_hp_param(state[key], _key(key))

    def finish(self, step: int) -> None:
        for flat in self._flats():
            state_of(self.zero.optimizer, flat)["step"].fill_(step)
        self.zero.update_lp_params()


class CutState:
    """Stage 3: each parameter is cut over data ranks on its own, the last part padded."""

    def __init__(self, optimizer: Any, dp: Axis):
        self.zero, self.dp = optimizer, dp
        for flat in self._flats():
            state_of(self.zero.optimizer, flat)

    def _flats(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def _part(self, param: Param, key: str) -> Tensor:
        return self.zero._get_fp32_opt_state_partition(param.tensor, False, _key(key))[0]

    def read(self, param: Param) -> dict[str, Tensor]:
        return {key: self._whole(param, self._part(param, key).detach()) for key in STATE}

    def _whole(self, param: Param, part: Tensor) -> Tensor:
        if self.dp.size == 1:
            return part.view(param.spec.local_shape(param.tp)).clone()
        whole = part.new_empty(part.numel() * self.dp.size)
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self.dp.group)
        return whole[: param.tensor.ds_numel].view(param.spec.local_shape(param.tp))

    def write(self, param: Param, state: dict[str, Tensor]) -> None:
        for key in STATE:
            part = self._part(param, key)
            padded = F.pad(state[key].flatten(), (0, part.numel() * self.dp.size - state[key].numel()))
            part.detach().copy_(padded.chunk(self.dp.size)[self.dp.rank])

    def finish(self, step: int) -> None:
        for flat in self._flats():
            state_of(self.zero.optimizer, flat)["step"].fill_(step)
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)


def _key(key: str) -> str | None:
    return None if key == "weight" else key
