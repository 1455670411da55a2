"""What a tracker is: the metrics file, the terminal, TensorBoard and W&B all have these methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of a step, after `step` optimizer steps. Names are metrics.NAMES or alike: group/name_unit."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Something to read, such as a sample of the model's text."""
        ...

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint has been saved there."""
        ...

    def close(self) -> None: ...
