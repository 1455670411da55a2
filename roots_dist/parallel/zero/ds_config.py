"""What DeepSpeed is told: its configuration, who is where, which parameters a rank counts. Generated, never written.

Config + Mesh + [Param] --settings, Grid, mark--> deepspeed.initialize, in engine.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from roots_dist.config.schema import Config
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param


def settings(config: Config, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration. num_elements: of this rank's parameters; no buffer is larger.

    Microbatches, the loss and the learning rate are ours, so accumulation is 1 step. Clipping is always given: left
    out, DeepSpeed clips to 1.
    """
    zero = config.parallel.zero_stage
    bucket = min(config.advanced.reduce_bucket, max(1, num_elements))
    bucket += bucket % 2  # it insists on whole pairs
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_grad if zero else 0.0,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,  # all gradients are reduced at once, after the last backward
            "sub_group_size": 1 << 60,  # the norm is summed once per sub-group, and all ranks must have equally many
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


class Grid:
    """The mesh in DeepSpeed's words (its `mpu`). It probes for sequence-parallel methods: there are none."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._dp_group = mesh.dp.group or mesh.alone()
        self._model_group = mesh.model.group or mesh.alone()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor and pipeline ranks: norms are summed over it."""
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


def mark(params: Sequence[Param], model: Axis) -> None:
    """Tell DeepSpeed's norm which parameters this rank counts. Right before initialize: a deepcopy would lose it.

    Stages 1 and 2 count what is not `ds_pipe_replicated` and is either `tensor_model_parallel` or on tensor rank 0;
    stage 3 what is `tensor_model_parallel` or on model rank 0. Set like this, each asks for counts_here.
    """
    for p in params:
        tensor: Any = p.tensor  # DeepSpeed reads attributes that torch's class does not declare
        tensor.tensor_model_parallel = p.counts_here
        tensor.ds_pipe_replicated = not p.counts_here
    assert model.rank > 0 or all(p.counts_here for p in params), "the first rank of a model holds originals only"
