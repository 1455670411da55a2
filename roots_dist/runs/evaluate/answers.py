"""Exact match of greedy answers to held-out questions (instruct, seq2seq).

    objective.question --decode--> answer --white space normalised--> exact match, by scikit-learn

Both texts are decoded by the tokenizer without special tokens. Runs of white space count as one space, and none at the
ends; case and punctuation matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from roots_dist.assembly.passes import Passes
from roots_dist.config.records import family_of
from roots_dist.config.schema import Config
from roots_dist.errors import missing_package, present
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.tokenizer import Codec
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.generate.stops import Stops
from roots_dist.world.batch import QuestionObjective

MORE = 8
"""Number of tokens that are generated beyond the longest expected answer, because white space does not count."""


class AnsweredQuestion(NamedTuple):
    """One question and its answers, as text."""

    question: str
    expected: str
    answer: str


class Answers(NamedTuple):
    exact_match: float
    questions: list[AnsweredQuestion]


def answer_questions(
    passes: Passes, objective: QuestionObjective, held_out: Batches, codec: Codec, count: int
) -> Answers:
    """Answer at most `count` held-out questions, the first that evaluation draws. A
    question longer than the model can hold loses its beginning. Collective over the world; equal on every rank."""
    rows = [objective.question(source, index) for source, index in held_out.evaluation_samples(count)]
    eos = {present(objective.specials.end), *objective.specials.tokens.eos}
    ends = frozenset({*eos, *(int(answer[-1]) for _, answer in rows if objective.specials.special[answer[-1]])})
    longest = max(len(answer) for _, answer in rows) + MORE
    room = _room(passes.config)
    longest = longest if room is None else min(longest, room // 2)
    texts = [question.tolist()[-room + longest :] if room else question.tolist() for question, _ in rows]
    start = objective.specials.pad if family_of(passes.config).has_two_stacks else None
    request = Request(longest, Sampling(temperature=0.0))
    replies = decode(passes, texts, request, Stops(ends), start=start)

    def words(ids: Iterable[int]) -> str:
        return normalised(codec.backend.decode(list(map(int, ids)), skip_special_tokens=True))

    questions = [
        AnsweredQuestion(words(text), words(answer), words(one.tokens))
        for text, (_, answer), (one,) in zip(texts, rows, replies)
    ]
    return Answers(_exact_match([one.expected for one in questions], [one.answer for one in questions]), questions)


def normalised(text: str) -> str:
    return " ".join(text.split())


def _room(config: Config) -> int | None:
    """Number of tokens of question and answer together that a decoder can hold; None if unlimited."""
    m = config.model
    return (
        (m.max_positions or config.data.seq_length)
        if family_of(config).is_decoder and m.positions == "learned"
        else None
    )


def _exact_match(expected: list[str], answers: list[str]) -> float:
    try:
        from sklearn.metrics import accuracy_score
    except ImportError:
        raise missing_package("scikit-learn", "finetune") from None
    number = {text: i for i, text in enumerate(dict.fromkeys([*expected, *answers]))}  # of each text, as a class
    return float(accuracy_score(np.array([number[t] for t in expected]), np.array([number[t] for t in answers])))
