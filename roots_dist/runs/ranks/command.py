"""A command that runs on ranks, as data: how to read its config, what to check, and what each rank does.

    cli/train.py, cli/evaluate.py … --Command--> run_on_ranks.py, which starts the ranks or is one

A Command is created when the command line is parsed, so this file imports nothing heavy. `work` imports torch on a
rank, after everything has been checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded
    from roots_dist.config.schema import Config


def _unchanged(loaded: Loaded, world_size: int) -> Loaded:
    return loaded


def without_training_batch(loaded: Loaded, world_size: int) -> Loaded:
    """Replace the batch by one that fits the world: without an optimizer step its size does not matter."""
    config = loaded.config
    ranks = max(1, world_size // config.parallel.tp)  # cp × dp × pp: a multiple of all divisors of a batch
    values = {"train.global_batch": config.train.micro_batch * ranks, "train.batch_ramp": None}
    return replace(loaded, config=config.changed(values))


def _no_check(config: Config) -> None:
    pass


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


@dataclass(frozen=True)
class Command:
    name: str
    read: Callable[[str, Sequence[str]], Loaded]
    """(run folder or config file, overrides) -> config. Raises UserError."""
    work: Callable[..., int | None]
    """(config, mesh) -> exit code; None means 0. Runs on every rank."""
    fit: Callable[[Loaded, int], Loaded] = _unchanged
    """(config, world size) -> config for a world of that size, if it depends on the size."""
    not_required: frozenset[str] = frozenset()
    """Keys that training needs and this command does not; problems with them are ignored."""
    trains: bool = True
    """True if it starts from a config, all of whose keys must be used, and not from an existing run."""
    check: Callable[..., None] = _no_check
    """Further checks of a valid config before the first process group. Raises UserError."""
    close: Callable[..., None] | None = None
    """(config, layout) -> nothing, on rank 0 after the work, when no other rank waits for it any more."""
    uses_all_gpus: bool = True
    """True if it uses all GPUs of this machine when run without a launcher; otherwise it uses those of one model
    replica."""
    say: Callable[[str], object] = _say
    """Called on one rank with a line about what takes long before the work begins and after its end."""
