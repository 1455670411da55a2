"""TensorBoard as a view of the run: event files in its folder, for `tensorboard --logdir RUN/tensorboard`.

Numbers have the names of metrics.jsonl, texts are texts, and the config and the facts of the run are texts of step 0.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.scrub import scrub_text
from roots_dist.storage.checkpoint.object_store import Place

log = logging.getLogger(__name__)

FOLDER = "tensorboard"


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
        """Events that were logged after `resumed_step` are marked as void: readers drop them."""
        from torch.utils.tensorboard import SummaryWriter

        is_new = resumed_step == 0
        self._writer = SummaryWriter(str(Path(folder) / FOLDER), purge_step=0 if is_new else resumed_step + 1)
        if is_new:
            for name, words in (("config", to_yaml(config)), ("facts", json.dumps(facts, indent=1))):
                self.text(0, name, scrub_text(words, known))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Log the text indented, which Markdown shows verbatim."""
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def checkpoint(self, step: int, path: Place) -> None:
        """Nothing to log: TensorBoard has no checkpoints."""

    def close(self) -> None:
        self._writer.close()
