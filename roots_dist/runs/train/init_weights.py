"""The first weights of fine-tuning: those of another run or of an import; what that model has not is drawn as ever.

    finetune.init_from --its outline, ours--> what is taken, what begins anew, what is left
        --checkpoint/load.py--> engine

Only what stands above the blocks may differ (a head for a task), and adapters. Anything else that is missing, left over
or of another shape is refused by name.
"""

from __future__ import annotations

import logging
from pathlib import Path

from roots_dist.assembly.run import Run
from roots_dist.config.init_from import config_of
from roots_dist.config.schema import Config
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.outline import ParameterPlace, outline
from roots_dist.parallel.optim.trainable import ADAPTER
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.storage.checkpoint.keep import best_or_newest
from roots_dist.storage.checkpoint.load import load_initial_weights

log = logging.getLogger(__name__)

CLASSES = "head.classifier."


def load_init_weights(run: Run) -> None:
    """Take the weights of finetune.init_from, where the config has one. Collective over the world."""
    start = run.config.finetune.init_from
    if start is None:
        return
    checkpoint, there = best_or_newest(Path(start)), config_of(start)
    tp = run.passes.model.tp
    fresh, left = compare_parameters(run.config, there, tp)
    load_initial_weights(checkpoint, run.engine, run.params, run.mesh, untrained=fresh, unused=left)
    drawn = f"; begins anew: {_shown(fresh)}" if fresh else ""
    log.info("starts from %s%s", checkpoint, drawn)


def compare_parameters(here: Config, there: Config, tp: TensorParallel) -> tuple[frozenset[str], frozenset[str]]:
    """Names of parameters that begin anew, and names that are left behind. Classes of other labels are other
    classes."""
    ours, theirs = outline(pieces_of(here, tp)), outline(pieces_of(there, tp))
    same_classes = (here.objective.name, here.finetune.labels) == (there.objective.name, there.finetune.labels)

    def may_differ(name: str, place: ParameterPlace) -> bool:
        return place.depth == 0 or name.endswith(ADAPTER)

    renewed = {n for n in ours if n.startswith(CLASSES) and not same_classes}
    fresh = {n for n, place in ours.items() if n not in theirs and may_differ(n, place)} | renewed
    generator = {n for n in theirs if n.startswith("generator.") and here.objective.name != there.objective.name}
    heads = {n for n, place in theirs.items() if n not in ours and place.depth == 0}
    return frozenset(fresh), frozenset(heads | generator | renewed)


def _shown(names: frozenset[str]) -> str:
    some = sorted(n for n in names if not n.endswith(ADAPTER))
    adapters = len(names) - len(some)
    return ", ".join([*some, *([f"{adapters} matrices of adapters"] if adapters else [])])
