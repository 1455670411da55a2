"""Chooses the side of the seam that a run is on. DeepSpeed is imported only where it is used: it takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.mesh import Mesh
from roots_dist.sharding import Param
from roots_dist.zero.seam import Engine


def engine_problems(config: Config, dp: int) -> list[Problem]:
    """What neither side can do. Pure."""
    kind, zero, found = config.engine(dp), config.parallel.zero, []
    if kind == "reference" and zero > 1 and dp > 1:
        fix = "set parallel.zero to 0 or 1, or advanced.engine to auto"
        found.append(Problem(key="parallel.zero", found=zero, expected="at most 1 with advanced.engine = reference", fix=fix))
    if kind == "deepspeed" and config.advanced.double:
        fix = "set advanced.engine to reference and parallel.zero to 0 or 1"
        found.append(Problem(key="advanced.double", found=True, expected="false where DeepSpeed shards", fix=fix))
    if kind == "deepspeed" and zero == 0 and config.train.precision == "bf16":
        fix = "set parallel.zero to 1, or advanced.engine to reference"
        expected = "at least 1 for bf16 with advanced.engine = deepspeed, whose stage 0 has no float32 master weights that agree"
        found.append(Problem(key="parallel.zero", found=0, expected=expected, fix=fix))
    return found


def build_engine(config: Config, mesh: Mesh, module: nn.Module, params: Sequence[Param]) -> Engine:
    """module: this rank's stages; params: its parameters, initialised. Collective over the world."""
    if problems := engine_problems(config, mesh.dp.size):
        raise ConfigError(problems)
    if config.engine(mesh.dp.size) == "reference":
        from roots_dist.zero.reference import ReferenceEngine

        return ReferenceEngine(config, mesh, module, params)
    from roots_dist.zero.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, mesh, module, params)
