"""What is wanted of a text, and what comes back: the words between the verbs, decode.py and beams.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from roots_dist.config.records import family_of
from roots_dist.config.schema import Config
from roots_dist.runs.generate.check_options import SAMPLING_OPTIONS
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.sampling import Sampling

MAX_TOKENS, TEMPERATURE, TOP = 100, 0.8, 5
"""Defaults where an option is not given."""


@dataclass(frozen=True)
class Request:
    """What is wanted of each text."""

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    samples: int = 1
    """Answers to each text; of beams the best ones."""
    beams: int = 0
    """0: words are chosen one by one, as `sampling` says; else beam search, which takes the likeliest texts."""
    length_penalty: float = 1.0
    early_stopping: bool = False
    """Beams: over as soon as so many texts have ended, though others might still become better."""
    rows: int = 16
    """Sequences that are decoded at the same time."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    """With the token that ended it, if one did."""
    score: float = 0.0
    """Of beam search: log-probability / length ** length_penalty"""


def make_request(options: GenerateOptions, config: Config) -> Request:
    """How a model that writes is to write. A decoder over an encoder is greedy unless told otherwise."""
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
