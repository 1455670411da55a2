"""DeepSpeed's configuration, generated from ours, and how the mesh and the counted parameters are passed to it.

Config + Mesh + [Param] --deepspeed_config, Mpu, mark_counted--> deepspeed.initialize, in engine.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from roots_dist.config.schema import Config
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param


def deepspeed_config(config: Config, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration. num_elements: elements of this rank's parameters; no buffer is larger.

    Microbatches, the loss and the learning rate are handled outside, so accumulation is 1 step. Clipping is always set,
    because DeepSpeed's default is to clip to 1.
    """
    zero = config.parallel.zero_stage
    gradients = config.advanced.grad_dtype if config.train.precision == "bf16" else "fp32"
    bucket = min(config.advanced.reduce_bucket, max(1, num_elements))
    bucket += bucket % 2  # DeepSpeed requires an even size
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_grad if zero else 0.0,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "communication_data_type": gradients,
        "data_types": {"grad_accum_dtype": gradients if zero == 3 else None},  # engine.py sets it for the others
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,  # all gradients are reduced at once, after the last backward
            "sub_group_size": 1 << 60,  # the norm is summed per sub-group, and all ranks must have equally many
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


class Mpu:
    """The mesh as DeepSpeed's model-parallel unit (`mpu`). Without sequence-parallel methods DeepSpeed assumes there is
    none."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._dp_group = mesh.dp_cp.group or mesh.single_rank_group()
        self._model_group = mesh.model.group or mesh.single_rank_group()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_cp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp_cp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor and pipeline ranks, over which norms are summed."""
        return self._model_group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tp.size

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pp.size


def mark_counted(params: Sequence[Param], model: Axis) -> None:
    """Mark the parameters that this rank counts in DeepSpeed's norm. Must directly precede initialize, since a deepcopy
    loses the marks.

    Stages 1 and 2 count parameters that are not `ds_pipe_replicated` and are either `tensor_model_parallel` or on
    tensor rank 0; stage 3 counts those that are `tensor_model_parallel` or on model rank 0. With these marks both count
    exactly the parameters with is_counted.
    """
    for p in params:
        tensor: Any = p.tensor  # DeepSpeed reads attributes that torch's class does not declare
        tensor.tensor_model_parallel = p.is_counted
        tensor.ds_pipe_replicated = not p.is_counted
    assert model.rank > 0 or all(p.is_counted for p in params), "the first rank of a model holds originals only"
