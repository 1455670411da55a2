"""The config of training or fine-tuning as a whole, which several verbs read: completed from the model it starts from
and from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded


def read_config(path: str, overrides: Sequence[str]) -> Loaded:
    """Raises UserError. Reads the rows of a task only where keys depend on them (labels, epochs)."""
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
