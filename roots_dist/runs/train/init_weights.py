"""Initial weights of fine-tuning: copied from another run or an import, drawn at random where that model has none.

    finetune.init_from --parameters of both models--> copied, fresh and left-out names --load_init_weights--> engine

Only parameters above the blocks (a task's head) and adapters may differ. Any other parameter that is missing, left over
or of another shape is an error that names it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from roots_dist.assembly.run import Run
from roots_dist.config.init_from import config_of
from roots_dist.config.schema import Config
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.parameter_locations import ParameterLocation, locate_parameters
from roots_dist.parallel.optim.trainable import ADAPTER
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.storage.checkpoint.load import load_initial_weights
from roots_dist.storage.checkpoint.verified import best_or_newest

log = logging.getLogger(__name__)

CLASSES = "head.classifier."


def load_init_weights(run: Run) -> None:
    """Load the weights of finetune.init_from, if the config has one. Collective over the world."""
    start = run.config.finetune.init_from
    if start is None:
        return
    checkpoint, source = best_or_newest(Path(start), run.mesh), config_of(start, run.config.advanced.extensions)
    tp = run.passes.model.tp
    fresh, left = compare_parameters(run.config, source, tp)
    load_initial_weights(checkpoint, run.engine, run.params, run.mesh, untrained=fresh, unused=left, verify=False)
    drawn = f"; drawn anew: {_format_names(fresh)}" if fresh else ""
    log.info("starts from %s%s", checkpoint, drawn)


def compare_parameters(config: Config, source: Config, tp: TensorParallel) -> tuple[frozenset[str], frozenset[str]]:
    """Names of parameters that are drawn anew, and names that are left out. A head for other labels is drawn anew."""
    ours, theirs = locate_parameters(pieces_of(config, tp)), locate_parameters(pieces_of(source, tp))
    same_classes = (config.objective.name, config.finetune.labels) == (source.objective.name, source.finetune.labels)

    def may_differ(name: str, place: ParameterLocation) -> bool:
        return place.depth == 0 or name.endswith(ADAPTER)

    renewed = {n for n in ours if n.startswith(CLASSES) and not same_classes}
    fresh = {n for n, place in ours.items() if n not in theirs and may_differ(n, place)} | renewed
    generator = {n for n in theirs if n.startswith("generator.") and config.objective.name != source.objective.name}
    heads = {n for n, place in theirs.items() if n not in ours and place.depth == 0}
    return frozenset(fresh), frozenset(heads | generator | renewed & theirs.keys())


def _format_names(names: frozenset[str]) -> str:
    some = sorted(n for n in names if not n.endswith(ADAPTER))
    adapters = len(names) - len(some)
    return ", ".join([*some, *([f"{adapters} adapter matrices"] if adapters else [])])
