"""Read the full config of training or fine-tuning, completed from the model that it starts from and from its rows.

cli/train.py, finetune.py, plan.py, verify.py, sample.py --read_config--> Loaded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded
    from roots_dist.config.schema import Config
    from roots_dist.errors import Problem


def read_config(path: str, overrides: Sequence[str]) -> Loaded:
    """Read and complete a config. Reads a task's rows only if keys depend on them (labels, epochs). Raises
    UserError."""
    from roots_dist.config.init_from import complete_from_model
    from roots_dist.config.load import read
    from roots_dist.config.records import objective_of

    loaded = complete_from_model(read(path, overrides))
    if (
        not objective_of(loaded.config).rows
        and loaded.config.finetune.epochs is None is loaded.config.finetune.unfreeze_every_epochs
    ):
        return loaded
    from roots_dist.config.load import COMMAND_LINE
    from roots_dist.errors import ConfigError, DataError, Problem
    from roots_dist.learning.objectives.task_checks import complete_from_rows

    steps = loaded.config.train.steps
    try:
        completed = complete_from_rows(loaded.config)
    except DataError as error:
        if isinstance(error.args[0], Problem):
            raise DataError(*loaded.located([error.args[0]])) from error
        raise
    said = [loaded.origins.get(key) for key in ("train.steps", "finetune.epochs")]
    wins = said[0] != COMMAND_LINE == said[1]  # as any override does, here over the steps of a run's own config.yaml
    if said[0] and not wins and completed.train.steps != steps:
        raise ConfigError(loaded.located([_two_lengths(completed, steps)]))
    return replace(loaded, config=completed)


def _two_lengths(completed: Config, steps: int) -> Problem:
    from roots_dist.errors import Problem

    epochs = completed.finetune.epochs
    return Problem(
        key="train.steps",
        found=steps,
        expected=f"{completed.train.steps}, which are finetune.epochs = {epochs} passes over data.train, or no value",
        fix="leave train.steps out, or set finetune.epochs=null",
    )
