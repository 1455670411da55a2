"""What learns, since which step and how fast: full, partial, progressive and low-rank fine-tuning as data.

    config.finetune + where each parameter stands --learned--> {name: Learned(from_step, scale)}; all others are frozen

Pure arithmetic over global names: the same on every rank. The engines (zero/) ask it who learns by now; frozen
parameters have no gradient, no master copy and no moments there.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem

Depths = Mapping[str, int]
"""Name of each parameter of the whole model -> 0 above all blocks, 1 in the last block, 2 in the one below it …; below
all blocks, one more than in the first block. In the order of the computation."""

LINEAR = ("query", "key", "value", "out", "up", "gate", "down")
"""Layers of a block that can have an adapter."""
ADAPTER = (".lora.a.weight", ".lora.b.weight")
"""How the names of its parameters end."""


class Trainable(NamedTuple):
    """Since how many steps of the run are done a parameter learns, and its share of the learning rate."""

    from_step: int = 0
    scale: float = 1.0


def trainable(config: Config, depths: Depths) -> dict[str, Trainable]:
    """Every parameter that will ever learn. Discriminative rates (Howard & Ruder 2018, section 3.2): each block learns
    with layer_decay times the rate of the next one; what is above the blocks with the full rate.

    Raises ConfigError if finetune.trainable or finetune.lora_targets name something that is not there.
    """
    since = STRATEGIES[config.finetune.strategy](config, depths)
    return {name: Trainable(step, config.finetune.layer_lr_decay ** depths[name]) for name, step in since.items()}


def has_trained(trainable: Mapping[str, Trainable], name: str, steps: int) -> bool:
    """Whether a parameter has had a part in the first `steps` steps, and so has moments (before the first: will
    have)."""
    return name in trainable and trainable[name].from_step < max(1, steps)


def _full(config: Config, depths: Depths) -> dict[str, int]:
    return dict.fromkeys(depths, 0)


def _partial(config: Config, depths: Depths) -> dict[str, int]:
    """A tied copy follows its original, whose name it bears."""
    if not config.finetune.trainable:
        raise ConfigError(
            [
                Problem(
                    key="finetune.trainable",
                    found=[],
                    expected="with finetune.strategy=partial at least one pattern of names that learn",
                    fix='say for example finetune.trainable=["head.*"], or use finetune.strategy=full',
                )
            ]
        )
    found = {pattern: fnmatch.filter(depths, pattern) for pattern in config.finetune.trainable}
    problems = [_unknown("finetune.trainable", pattern, list(depths)) for pattern, names in found.items() if not names]
    if problems:
        raise ConfigError(problems)
    chosen = {name for names in found.values() for name in names}
    return {name: 0 for name in depths if name in chosen}


def _progressive(config: Config, depths: Depths) -> dict[str, int]:
    """Gradual unfreezing (Howard & Ruder 2018, section 3.3): first what is above the blocks (if nothing is, the top
    blocks), then finetune.unfreeze_blocks more every finetune.unfreeze_every steps, at last what is below them."""
    every, blocks = config.finetune.unfreeze_every, config.finetune.unfreeze_blocks
    below = max(depths.values())  # one more than there are blocks
    last = -(-(below - 1) // blocks) + 1
    phase = {name: last if depth == below else -(-depth // blocks) for name, depth in depths.items()}
    first = min(phase.values())
    return {name: (number - first) * every for name, number in phase.items()}


def _lora(config: Config, depths: Depths) -> dict[str, int]:
    """The adapters; and what is above the blocks where it is made for a task and has to learn from nothing."""
    adapted = {name.removesuffix(ADAPTER[0]).rpartition(".")[2] for name in depths if name.endswith(ADAPTER[0])}
    there = [layer for layer in LINEAR if any(name.endswith(f".{layer}.weight") for name in depths)]
    problems = [
        _unknown("finetune.lora_targets", t, there) for t in config.finetune.lora_targets or ("",) if t not in adapted
    ]
    if problems:
        raise ConfigError(problems)
    for_a_task = config.objective.name in ("classify", "tag")
    return {name: 0 for name, depth in depths.items() if name.endswith(ADAPTER) or (for_a_task and depth == 0)}


def _unknown(key: str, found: str, known: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(found.strip("*."), known, n=3, cutoff=0.4) or known[:3]
    return Problem(
        key=key,
        found=found,
        expected="a name, or a pattern of names, of this model",
        fix=f"choose for example {' or '.join(near)}",
    )


STRATEGIES: dict[str, Callable[[Config, Depths], dict[str, int]]] = {
    "full": _full,
    "partial": _partial,
    "progressive": _progressive,
    "lora": _lora,
}
