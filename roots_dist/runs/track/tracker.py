"""Interface of a tracker, which the metrics file, the terminal, TensorBoard and W&B implement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

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
