"""Choose the parameters that a shrunk model trains, so that a proof moves the same parts as the large model's run.

    config.finetune on the large model --trainable--> names --same relative depth--> finetune.* of the small one

Raises ConfigError for names that the large model does not have, before any process starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from roots_dist.config.schema import Config
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.parameter_locations import depths_of
from roots_dist.parallel.optim.trainable import Depths, trainable
from roots_dist.parallel.tensor.collectives import TensorParallel

BLOCK = re.compile(r"(?P<stack>(?:\w+\.)*blocks\.)(?P<number>\d+)(?P<rest>\..+)")


def depths(config: Config) -> Depths:
    return depths_of(pieces_of(config, TensorParallel()))


def with_same_trainable(config: Config, small: Config) -> Config:
    """The small config, whose strategy does in a few steps what the large one's does in its run."""
    strategy = config.finetune.strategy
    if strategy == "full":
        return small
    names = trainable(config, depths(config))
    if strategy == "partial":
        return small.changed({"finetune.trainable": _same_blocks(names, depths(config), depths(small))})
    if strategy == "progressive":  # one step each for what is above the blocks, the blocks, and below them
        return small.changed(
            {
                "finetune.unfreeze_every": 1,
                "finetune.unfreeze_every_epochs": None,
                "finetune.unfreeze_blocks": max(depths(small).values()),
            }
        )
    return small


def _same_blocks(trained: Iterable[str], large: Iterable[str], small: Iterable[str]) -> tuple[str, ...]:
    """Names of the small model that correspond to one of `trained`."""
    small_blocks, large_blocks = _blocks(small), _blocks(large)

    def scaled(name: str) -> str:
        block = BLOCK.fullmatch(name)
        if block is None:
            return name
        stack = block["stack"]
        return f"{stack}{int(block['number']) * small_blocks[stack] // large_blocks[stack]}{block['rest']}"

    wanted = set(map(scaled, trained))
    return tuple(name for name in small if name in wanted)


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """Number of blocks in each stack."""
    found = [block for name in names if (block := BLOCK.fullmatch(name))]
    return {
        stack: 1 + max(int(b["number"]) for b in found if b["stack"] == stack) for stack in {b["stack"] for b in found}
    }
