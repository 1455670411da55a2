"""Standard deviations of the initial weights: one number for GPT and BERT, by fan-in for T5."""

from __future__ import annotations

import math
from typing import NamedTuple

from roots_dist.config.records import family_of
from roots_dist.config.schema import Config


class InitStds(NamedTuple):
    """Standard deviations of a block's matrices."""

    query: float
    key: float
    """The value matrix has the same."""
    out: float
    up: float
    """The gate matrix has the same."""
    down: float


def _by_fan_in(config: Config) -> bool:
    return family_of(config).init == "fan-in" and config.model.init_std is None


def embedding_std(config: Config) -> float:
    """Standard deviation of the token embedding; 1 for T5, as in its code."""
    return 1.0 if _by_fan_in(config) else config.model.std()


def projection_std(config: Config) -> float:
    """Standard deviation of an untied output projection."""
    m = config.model
    return m.hidden**-0.5 if _by_fan_in(config) else m.std()


def init_stds(config: Config) -> InitStds:
    """Standard deviations of a block. GPT-2 (Radford et al. 2019, 2.3) scales the last matrix of each residual branch
    down by the number of branches in the whole model; BERT does not. T5 scales by fan-in, and queries also by the root
    of the head width instead of a scale in attention (Raffel et al. 2020, 3.1.1; numbers from its code)."""
    m = config.model
    if _by_fan_in(config):
        head, inner = m.width_of_head(), m.heads * m.width_of_head()
        return InitStds(
            (m.hidden * head) ** -0.5, m.hidden**-0.5, inner**-0.5, m.hidden**-0.5, m.width_of_ffn() ** -0.5
        )
    branches = 2 * m.layers if family_of(config).init == "residual" else 1
    last = m.std() / math.sqrt(branches)
    return InitStds(m.std(), m.std(), last, m.std(), last)
