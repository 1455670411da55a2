"""What a verb that runs on ranks is, as data: where its config comes from, what is checked, what is done on each rank.

    cli/train.py, cli/evaluate.py … --Verb--> start.py, which starts the ranks or is one

A Verb is made when the command line is read, so nothing heavy is imported here; `work` imports torch, on a rank, once
everything has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded
    from roots_dist.config.schema import Config


def _as_it_is(loaded: Loaded, world_size: int) -> Loaded:
    return loaded


def without_training_batch(loaded: Loaded, world_size: int) -> Loaded:
    """Replace the batch by one that fits the world: evaluation has no optimizer step whose size matters."""
    config = loaded.config
    ranks = max(1, world_size // config.parallel.tp)  # of dp × pp: a multiple of every number that batches are cut by
    values = {"train.global_batch": config.train.micro_batch * ranks, "train.batch_ramp": None}
    return replace(loaded, config=config.changed(values))


def _nothing_more(config: Config) -> None:
    pass


@dataclass(frozen=True)
class Verb:
    name: str
    read: Callable[[str, Sequence[str]], Loaded]
    """(what the user named, overrides) -> config. Raises UserError."""
    work: Callable[..., int | None]
    """(config, mesh) -> exit code, None for 0. Runs on every rank."""
    fit: Callable[[Loaded, int], Loaded] = _as_it_is
    """(config, world size) -> the config for a world of that size, where it depends on the size."""
    not_required: frozenset[str] = frozenset()
    """Keys that training needs and this verb does not: problems with them are ignored."""
    trains: bool = True
    """It begins with a config, not with a run that has one: all of the config is held to be of use."""
    check: Callable[..., None] = _nothing_more
    """Further checks before the first process group, once the config is sound. Raises UserError."""
    uses_all_gpus: bool = True
    """Without a launcher it takes all GPUs of this machine; otherwise those of one replica of the model."""
