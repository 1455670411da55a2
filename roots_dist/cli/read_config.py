"""Read the full config of training or fine-tuning, completed from the model that it starts from and from its rows.

cli/train.py, finetune.py, plan.py, verify.py, sample.py --read_config--> Loaded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded


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
    from roots_dist.learning.objectives.task_checks import complete_from_rows

    return replace(loaded, config=complete_from_rows(loaded.config))
