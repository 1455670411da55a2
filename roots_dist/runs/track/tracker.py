"""Interface of a tracker, which the metrics file, the terminal, TensorBoard and W&B implement; the last two are used
where their packages are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Protocol

from roots_dist.errors import missing_package
from roots_dist.storage.checkpoint.object_store import Place


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers after `step` optimizer steps. Names are those of metrics.NAMES or similar: group/name_unit."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, such as a sample of the model's."""
        ...

    def checkpoint(self, step: int, path: Place) -> None:
        """Note that a checkpoint has been saved at `path`."""
        ...

    def close(self) -> None: ...


def is_wanted(package: str, word: str) -> bool:
    """Decide whether a tracker is used, by the word that the config has for it. Raises EnvironmentProblem if the config
    demands it and its package is not installed; `auto` then means no."""
    if word in ("off", "disabled"):
        return False
    if importlib.util.find_spec(package) is not None:
        return True
    if word == "auto":
        return False
    raise missing_package(package, package)
