"""TensorBoard as another view of the run: event files in the run's folder, for `tensorboard --logdir RUN/tensorboard`.

Numbers under the names that metrics.jsonl has, texts as text, the config and the facts of the run as a text of step 0.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import missing_package
from roots_dist.scrub import scrub_text

log = logging.getLogger(__name__)

FOLDER = "tensorboard"


def is_wanted(config: Config) -> bool:
    """Raises EnvironmentProblem if TensorBoard was asked for by name and is not installed; with `auto` that is no
    error."""
    asked = config.track.tensorboard
    if asked == "off":
        return False
    if importlib.util.find_spec("tensorboard") is not None:
        return True
    if asked == "auto":
        return False
    raise missing_package("tensorboard", "tensorboard")


class TensorBoard:
    """A tracker."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        facts: Mapping[str, object],
        resumed_step: int = 0,
        known: Collection[str] = (),
    ):
        """What was logged after `resumed_step` is marked as void: readers drop it."""
        from torch.utils.tensorboard import SummaryWriter

        anew = resumed_step == 0
        self._writer = SummaryWriter(str(Path(folder) / FOLDER), purge_step=0 if anew else resumed_step + 1)
        if anew:
            for name, words in (("config", to_yaml(config)), ("facts", json.dumps(facts, indent=1))):
                self.text(0, name, scrub_text(words, known))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Indented, which in Markdown is text as it stands."""
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def checkpoint(self, step: int, path: Path) -> None:
        """It has nothing for them; they stand in the run's folder."""

    def close(self) -> None:
        self._writer.close()
