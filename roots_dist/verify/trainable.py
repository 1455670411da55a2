"""What learns in a small model that stands for a large one, so that a proof moves the same parts.

    config.finetune on the large model --learned--> names
        --block by block, at the same height--> finetune.* of the small one

Raises ConfigError for names that the large model has not, before any process starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from roots_dist.config.schema import Config
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.outline import outline
from roots_dist.parallel.optim.trainable import Depths, trainable
from roots_dist.parallel.tensor.collectives import DeferredWeightGrads, TensorParallel
from roots_dist.world.mesh import SINGLE

BLOCK = re.compile(r"(?P<stack>(?:\w+\.)*blocks\.)(?P<number>\d+)(?P<rest>\..+)")


def depths(config: Config) -> Depths:
    return {
        name: place.depth
        for name, place in outline(pieces_of(config, TensorParallel(SINGLE, False, DeferredWeightGrads()))).items()
    }


def with_same_trainable(config: Config, small: Config) -> Config:
    """The small config with a strategy that does in a few steps what the large one's does in its run."""
    strategy = config.finetune.strategy
    if strategy == "full":
        return small
    there = trainable(config, depths(config))
    if strategy == "partial":
        return small.changed({"finetune.trainable": _same_blocks(there, depths(config), depths(small))})
    if strategy == "progressive":  # above the blocks, the blocks, below them: a step each
        return small.changed(
            {
                "finetune.unfreeze_every": 1,
                "finetune.unfreeze_every_epochs": None,
                "finetune.unfreeze_blocks": max(depths(small).values()),
            }
        )
    return small


def _same_blocks(learn: Iterable[str], large: Iterable[str], small: Iterable[str]) -> tuple[str, ...]:
    """Of the small model, all names whose like is among `learn`."""
    here, there = _blocks(small), _blocks(large)

    def down(name: str) -> str:
        block = BLOCK.fullmatch(name)
        if block is None:
            return name
        stack = block["stack"]
        return f"{stack}{int(block['number']) * here[stack] // there[stack]}{block['rest']}"

    wanted = set(map(down, learn))
    return tuple(name for name in small if name in wanted)


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """How many there are in each stack."""
    found = [block for name in names if (block := BLOCK.fullmatch(name))]
    return {
        stack: 1 + max(int(b["number"]) for b in found if b["stack"] == stack) for stack in {b["stack"] for b in found}
    }
