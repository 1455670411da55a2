"""ROOTS: train language models with explicit parallelism that proves itself.

The functions and classes of docs/python.md. Each is imported from roots_dist/api when it is first asked for, so that
`import roots_dist` takes no time and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roots_dist.api.model import Model, TextScore, load
    from roots_dist.api.training import Moment, Training, batches, read_config, train, training
    from roots_dist.config.extensions import Extension, NewFamily, NewObjective
    from roots_dist.config.families import FamilyRecord
    from roots_dist.config.lr_schedules import LrSchedule
    from roots_dist.config.objectives import ObjectiveRecord
    from roots_dist.config.optimizers import NewOptimizer, OptimizerStep
    from roots_dist.config.schema import Config
    from roots_dist.errors import UserError
    from roots_dist.runs.train.step import StepReport
    from roots_dist.schedule.schedules import Schedule
    from roots_dist.world.batch import MicroBatch

__version__ = "0.1.0"
__all__ = (
    "Config",
    "Extension",
    "FamilyRecord",
    "LrSchedule",
    "MicroBatch",
    "Model",
    "Moment",
    "NewFamily",
    "NewObjective",
    "NewOptimizer",
    "ObjectiveRecord",
    "OptimizerStep",
    "Schedule",
    "StepReport",
    "TextScore",
    "Training",
    "UserError",
    "batches",
    "load",
    "read_config",
    "train",
    "training",
)
_HOMES = {
    **dict.fromkeys(("Model", "TextScore", "load"), "roots_dist.api.model"),
    **dict.fromkeys(("Moment", "Training", "batches", "read_config", "train", "training"), "roots_dist.api.training"),
    **dict.fromkeys(("Extension", "NewFamily", "NewObjective"), "roots_dist.config.extensions"),
    **dict.fromkeys(("NewOptimizer", "OptimizerStep"), "roots_dist.config.optimizers"),
    "FamilyRecord": "roots_dist.config.families",
    "LrSchedule": "roots_dist.config.lr_schedules",
    "ObjectiveRecord": "roots_dist.config.objectives",
    "Schedule": "roots_dist.schedule.schedules",
    "Config": "roots_dist.config.schema",
    "MicroBatch": "roots_dist.world.batch",
    "StepReport": "roots_dist.runs.train.step",
    "UserError": "roots_dist.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'roots_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
