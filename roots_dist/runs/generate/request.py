"""Request and answer of generation: the data between the commands, decode.py and beams.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from roots_dist.config.records import family_of
from roots_dist.config.schema import Config
from roots_dist.runs.generate.check_options import SAMPLING_OPTIONS
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.sampling import Sampling

MAX_TOKENS, TEMPERATURE, TOP = 100, 0.8, 5
"""Defaults of options that were not given."""


@dataclass(frozen=True)
class Request:
    """How to answer each text."""

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    samples: int = 1
    """Number of answers to each text; with beams, the best ones."""
    beams: int = 0
    """Number of beams; 0 samples token by token as `sampling` says."""
    length_penalty: float = 1.0
    early_stopping: bool = False
    """Whether beam search stops as soon as `beams` hypotheses are finished, even if others might become better."""
    rows: int = 16
    """Number of sequences that are decoded at the same time."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    """Generated tokens, including the token that ended the text."""
    score: float = 0.0
    """Score of beam search: log-probability / length ** length_penalty."""


def make_request(options: GenerateOptions, config: Config) -> Request:
    """Request from the options. An encoder-decoder is greedy by default."""
    drawn = options.given(SAMPLING_OPTIONS) or options.given(("samples",)) or not family_of(config).has_two_stacks
    temperature = TEMPERATURE if options.temperature is None else options.temperature
    sampling = Sampling(
        temperature if drawn and not options.greedy else 0.0,
        options.top_k,
        options.top_p,
        options.min_p,
        options.repetition_penalty or 1.0,
    )
    return Request(
        options.max_tokens or MAX_TOKENS,
        sampling,
        options.seed,
        samples=options.samples or 1,
        beams=options.beams or 0,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty,
    )
