"""What the verbs that run on ranks have in common, as data: where the config comes from, what is checked, what is done.

    cli.py --TRAIN | EVALUATE--> start.py, which starts the ranks or is one

torch is imported by `work`, on a rank, when everything has been checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from roots_dist.config.load import Loaded, read
from roots_dist.config.of_run import of_run
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem


def _as_it_is(loaded: Loaded, world_size: int) -> Loaded:
    return loaded


@dataclass(frozen=True)
class Verb:
    name: str
    read: Callable[[str, Sequence[str]], Loaded]
    """(what the user named, overrides) -> config."""
    work: Callable[..., object]
    """(config, mesh), on every rank."""
    fit: Callable[[Loaded, int], Loaded] = _as_it_is
    """The config for a world of this size, where it depends on that."""
    needless: frozenset[str] = frozenset()
    """Keys that training needs and this verb does not: what is wrong with them does not matter."""


def _train(config: Config, mesh) -> None:
    from roots_dist.train.loop import train

    train(config, mesh)


def _evaluate(config: Config, mesh) -> None:
    from roots_dist.evaluate.evaluate import evaluate

    evaluate(config, mesh)


def _read_for_evaluation(run: str, overrides: Sequence[str]) -> Loaded:
    """All of the held-out text, unless told otherwise."""
    loaded = of_run(run, overrides, {"train.eval_sequences": sys.maxsize})
    if not loaded.config.data.validation:
        fix = "name a prefix: roots evaluate RUN data.validation=data/mine/validation_text_document"
        raise ConfigError([Problem(key="data.validation", found=[], expected="a held-out corpus", fix=fix)])
    return loaded


def _without_training_batch(loaded: Loaded, world_size: int) -> Loaded:
    """Evaluation has no optimizer step whose size could fit the world or not."""
    config = loaded.config
    ranks = max(1, world_size // config.parallel.tp)  # of dp × pp: a multiple of every number that batches are cut by
    values = {"train.batch": config.train.micro_batch * ranks, "train.batch_ramp": None}
    return replace(loaded, config=config.changed(values))


TRAIN = Verb("train", read, _train)
EVALUATE = Verb(
    "evaluate",
    _read_for_evaluation,
    _evaluate,
    _without_training_batch,
    needless=frozenset({"data.train", "data.tokenizer", "track.folder", "model"}),  # model: memory for optimizer states
)
