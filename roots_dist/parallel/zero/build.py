"""Chooses the engine of a run. DeepSpeed is imported only if it is used, because the import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from roots_dist.config.schema import Config
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero.seam import Engine
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param


def build_engine(
    config: Config,
    mesh: Mesh,
    module: nn.Module,
    params: Sequence[Param],
    trainable: Mapping[str, Trainable],
    ties: Mapping[str, Axis],
) -> Engine:
    """Create the engine. Collective over the world.

    module: this rank's stages; params: its initialized parameters; trainable: the trainable parameters of the whole
    model; ties: for each parameter that other pipeline ranks hold too, the axis over these. The config has passed
    checks/checks.py, which knows what each engine supports.
    """
    if config.advanced.engine == "reference":
        from roots_dist.parallel.zero.reference import ReferenceEngine

        return ReferenceEngine(config, mesh, module, params, trainable, ties)
    from roots_dist.parallel.zero.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, mesh, module, params, trainable, ties)
