"""Scaling of rotary frequencies for texts longer than those a model was first trained on: one record per rule.

    model.rope_scaling: {type: llama3, factor: 8, original_length: 8192} --learning/models/rotary.py--> frequencies

Each rule has its own keys, and `original_length` is one of them: it belongs to the model, and is never taken from the
length of the texts that a run trains on. Names of the rules are those of transformers.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from roots_dist.config.section import Section


class Linear(Section):
    """Every position is divided by `factor` (Chen et al. 2023, position interpolation)."""

    type: Literal["linear"]
    factor: float = Field(ge=1)


class Llama3(Section):
    """Frequencies of wavelengths beyond original_length / low_freq_factor are divided by `factor`, those of wavelengths
    below original_length / high_freq_factor are kept, and between the two it is interpolated (Llama 3.1)."""

    type: Literal["llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_length: int = Field(ge=1)


class Yarn(Section):
    """Frequencies with fewer than beta_slow turns over original_length are divided by `factor`, those with more than
    beta_fast are kept, with a ramp between them; cos and sin are multiplied by attention_factor (Peng et al. 2023)."""

    type: Literal["yarn"]
    factor: float = Field(ge=1)
    original_length: int = Field(ge=1)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    attention_factor: float | None = Field(None, gt=0)
    """Factor on cos and sin; by default 0.1 ln(factor) + 1, or as mscale and mscale_all_dim say."""
    mscale: float | None = Field(None, gt=0)
    mscale_all_dim: float | None = Field(None, gt=0)
    truncate: bool = True
    """True if the ends of the ramp are rounded to whole dimensions."""


class LongRope(Section):
    """Each frequency is divided by a factor of its own: by short_factor if the run's texts have at most original_length
    tokens, otherwise by long_factor; cos and sin are multiplied by attention_factor (Ding et al. 2024; Phi-3)."""

    type: Literal["longrope"]
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int = Field(ge=2)
    attention_factor: float | None = Field(None, gt=0)
    """Factor on cos and sin; by default sqrt(1 + ln f / ln original_length), with f = model.max_positions /
    original_length."""


RULES: dict[str, type[Section]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn, "longrope": LongRope}
"""Each record by its `type`."""
RopeScaling = Annotated[Linear | Llama3 | Yarn | LongRope, Field(discriminator="type")]


def mscale(factor: float, weight: float) -> float:
    """The factor by which YaRN multiplies queries and keys, for positions stretched by `factor`; weight: mscale or
    mscale_all_dim."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def score_factor(scaling: RopeScaling | None) -> float:
    """The factor by which latent attention multiplies scores in addition: that of YaRN for the channels that are not
    rotated (the code of DeepSeek-V2 and V3). For the rotated channels, cos and sin contain the rest."""
    if not isinstance(scaling, Yarn) or scaling.mscale_all_dim is None:
        return 1.0
    return mscale(scaling.factor, scaling.mscale_all_dim) ** 2
