"""Request and answer of generation: the data between the commands, decode.py and beams.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from roots_dist.config.records import family_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import GENERATION, read_companions
from roots_dist.errors import DataError, Problem
from roots_dist.runs.generate.check_options import SAMPLING_OPTIONS
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.sampling import Sampling

MAX_TOKENS, TEMPERATURE, TOP = 100, 0.8, 5
"""Defaults of options that were not given."""
RANGES = {
    "temperature": (0, math.inf), "top_k": (1, math.inf), "top_p": (1e-6, 1), "min_p": (0, 1),
    "repetition_penalty": (1e-6, math.inf),
}  # fmt: skip
"""Key of generation_config.json, and option -> its values."""


@dataclass(frozen=True)
class Request:
    """Settings of the answer to each text."""

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    samples: int = 1
    """Number of answers to each text; with beams, the best ones."""
    beams: int = 0
    """Number of beams; 0 samples token by token as `sampling` says."""
    length_penalty: float = 1.0
    early_stopping: bool = False
    """True if beam search stops as soon as `beams` hypotheses are finished, even if others might become better."""
    rows: int = 16
    """Number of sequences that are decoded at the same time."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    """Generated tokens, including the token that ended the text."""
    score: float = 0.0
    """Score of beam search: log-probability / length ** length_penalty."""


def sampling_defaults(tokenizer: str | None) -> dict[str, float]:
    """Sampling options of generation_config.json beside a tokenizer; empty unless it says do_sample. Raises DataError
    for values that are none."""
    found = {} if tokenizer is None else read_companions(Path(tokenizer).parent).get(GENERATION, {})
    if found.get("do_sample") is not True:
        return {}
    defaults: dict[str, float] = {"temperature": 1.0}  # transformers', where the file names none
    for name, (low, high) in RANGES.items():
        value = found.get(name)
        if value is None or (name == "top_k" and value == 0):  # 0: all tokens
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            key, fix = f"{GENERATION} beside {tokenizer}: {name}", "correct the file"
            raise DataError(Problem(key=key, found=value, expected=f"a number from {low:g} to {high:g}", fix=fix))
        defaults[name] = value
    return defaults


def make_request(options: GenerateOptions, config: Config) -> Request:
    """Request from the options, else as the model's authors sample (sampling_defaults). An encoder-decoder is greedy by
    default."""
    drawn = options.given(SAMPLING_OPTIONS) or options.given(("samples",)) or not family_of(config).has_two_stacks
    alike = {} if options.greedy or options.beams else sampling_defaults(config.data.tokenizer)

    def chosen(name: str) -> float | None:
        given: float | None = getattr(options, name)
        return alike.get(name) if given is None else given

    temperature, top_k = chosen("temperature"), chosen("top_k")
    sampling = Sampling(
        (TEMPERATURE if temperature is None else temperature) if drawn and not options.greedy else 0.0,
        None if top_k is None else int(top_k),
        chosen("top_p"),
        chosen("min_p"),
        chosen("repetition_penalty") or 1.0,
    )
    return Request(
        options.max_tokens or MAX_TOKENS,
        sampling,
        options.seed,
        samples=options.samples or 1,
        beams=options.beams or 0,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty,
    )
