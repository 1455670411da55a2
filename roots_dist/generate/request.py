"""What is wanted of a text, and what comes back: the words between the verbs, decode.py and beams.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from roots_dist.generate.sampling import Sampling


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
