"""The trained parameters, from which step and at which rate: full, partial, progressive and LoRA fine-tuning as
data.

    config.finetune + depth of each parameter --trainable--> {name: Trainable(from_step, scale)}; all others are frozen

Pure arithmetic over global names, the same on every rank. The engines (zero/) ask which parameters are trained by now;
frozen parameters have no gradient, no master copy and no moments.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from roots_dist.config.other_names import layers_for
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem

Depths = Mapping[str, int]
"""Name of each parameter of the whole model -> its depth, in the order of the computation: 0 above all blocks, 1 in the
last block, 2 in the block below it …; below all blocks, one more than in the first block."""

LINEAR = ("query", "key", "value", "query_down", "kv_down", "kv_up", "out", "up", "gate", "down")
"""Layers of a block that can have an adapter."""
ADAPTER = (".lora.a.weight", ".lora.b.weight")
"""Suffixes of an adapter's parameter names."""
EXPERT = re.compile(r"\.experts\.\d+\.")


class Trainable(NamedTuple):
    """The step from which a parameter is trained, and the factor on its learning rate."""

    from_step: int = 0
    scale: float = 1.0


def trainable(config: Config, depths: Depths) -> dict[str, Trainable]:
    """Every parameter that is trained at some step. Each block has layer_lr_decay times the rate of the next one, and
    the head has the full rate (discriminative fine-tuning, Howard & Ruder 2018, section 3.2).

    Raises ConfigError if finetune.trainable or finetune.lora_targets match nothing in the model.
    """
    from_steps = STRATEGIES[config.finetune.strategy](config, depths)
    return {name: Trainable(step, config.finetune.layer_lr_decay ** depths[name]) for name, step in from_steps.items()}


def has_trained(trainable: Mapping[str, Trainable], name: str, steps: int) -> bool:
    """True if a parameter was trained in the first `steps` steps and therefore has moments (for steps=0: if it will
    be)."""
    return name in trainable and trainable[name].from_step < max(1, steps)


def _full(config: Config, depths: Depths) -> dict[str, int]:
    return dict.fromkeys(depths, 0)


def _partial(config: Config, depths: Depths) -> dict[str, int]:
    """Parameters that match finetune.trainable. A tied copy follows its original, whose name it has."""
    if not config.finetune.trainable:
        raise ConfigError(
            [
                Problem(
                    key="finetune.trainable",
                    found=[],
                    expected="at least one pattern of parameter names with finetune.strategy=partial",
                    fix='set for example finetune.trainable=["head.*"], or use finetune.strategy=full',
                )
            ]
        )
    found = {pattern: fnmatch.filter(depths, pattern) for pattern in config.finetune.trainable}
    problems = [_unknown("finetune.trainable", pattern, list(depths)) for pattern, names in found.items() if not names]
    if problems:
        raise ConfigError(problems)
    chosen = {name for names in found.values() for name in names}
    if config.parallel.ep > 1 and (uneven := _learned_by_some(depths, chosen)):
        expected = f"all experts of a layer or none with parallel.ep above 1: not some of {uneven}"
        fix = f"use {uneven}, or set parallel.ep=1"
        found_now = list(config.finetune.trainable)
        raise ConfigError([Problem(key="finetune.trainable", found=found_now, expected=expected, fix=fix)])
    return {name: 0 for name in depths if name in chosen}


def _learned_by_some(depths: Depths, chosen: Collection[str]) -> str | None:
    """A pattern of the matrices of a layer's experts of which some learn and others do not. Where they are on different
    ranks, backward would wait for gradients that are not sent."""
    kinds: dict[str, set[bool]] = {}
    for name in depths:
        kinds.setdefault(EXPERT.sub(".experts.*.", name), set()).add(name in chosen)
    return next((pattern for pattern, learned in kinds.items() if len(learned) > 1), None)


def _progressive(config: Config, depths: Depths) -> dict[str, int]:
    """Gradual unfreezing (Howard & Ruder 2018, section 3.3): first everything above the blocks (if nothing is, the top
    blocks), then finetune.unfreeze_blocks more every finetune.unfreeze_every steps, finally everything below the
    blocks."""
    every, blocks = config.finetune.unfreeze_every, config.finetune.unfreeze_blocks
    below = max(depths.values())  # one more than there are blocks
    last = -(-(below - 1) // blocks) + 1
    phase = {name: last if depth == below else -(-depth // blocks) for name, depth in depths.items()}
    first = min(phase.values())
    return {name: (number - first) * every for name, number in phase.items()}


def _lora(config: Config, depths: Depths) -> dict[str, int]:
    """The adapters, and a task's head, which has no pre-trained weights."""
    adapted = {name.removesuffix(ADAPTER[0]).rpartition(".")[2] for name in depths if name.endswith(ADAPTER[0])}
    layers = [layer for layer in LINEAR if any(name.endswith(f".{layer}.weight") for name in depths)]
    unknown = [target for target in config.finetune.lora_targets or ("",) if target not in adapted]
    problems = [_unknown_layer(target, layers) for target in unknown]
    if problems:
        raise ConfigError(problems)
    for_a_task = objective_of(config).has_labels
    return {name: 0 for name, depth in depths.items() if name.endswith(ADAPTER) or (for_a_task and depth == 0)}


def _unknown_layer(found: str, known: Sequence[str]) -> Problem:
    """A target that the model has not: of all layers, and by the name that others have for it, it is told ours."""
    ours = list(known) if found in ("all-linear", "all", "*") else [n for n in layers_for(found) if n in known]
    problem = _unknown("finetune.lora_targets", found, known)
    return replace(problem, fix=f"write {', '.join(ours)} for it") if ours else problem


def _unknown(key: str, found: str, known: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(found.strip("*."), known, cutoff=0.4) or known[:3]
    return Problem(
        key=key,
        found=found,
        expected="a name or a pattern that matches this model",
        fix=f"choose for example {' or '.join(near)}",
    )


STRATEGIES: dict[str, Callable[[Config, Depths], dict[str, int]]] = {
    "full": _full,
    "partial": _partial,
    "progressive": _progressive,
    "lora": _lora,
}
