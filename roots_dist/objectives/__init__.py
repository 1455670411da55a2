"""What is learned. OBJECTIVES maps objective.name to a class as objectives/base.py describes it: which samples a source
holds, what each is (a pure function of seed and number), which terms its loss has and what each is divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from roots_dist.config.schema import Config
from roots_dist.objectives.base import Objective
from roots_dist.objectives.clm import CausalTokens

if TYPE_CHECKING:
    from roots_dist.data.specials import Specials

OBJECTIVES: dict[str, Callable[[Config, Specials | None], Objective]] = {"clm": CausalTokens}


def make_objective(config: Config) -> Objective:
    """The config's, with the special tokens of its tokenizer. Raises DataError if it needs some that are not there."""
    return OBJECTIVES[config.objective.name](config, None)
