"""The objectives as records: who learns them, what they read, need and answer. One table; everything else asks it.

    objective.name --records.py--> ObjectiveRecord: checks, accounting, heads, evaluation, generation, exchange

A class in learning/objectives/ (OBJECTIVES, by the same names) makes the samples and counts the terms of the loss.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from roots_dist.config.families import FAMILIES
from roots_dist.config.span_lengths import SpanLengths, span_lengths

Answer = Literal["write", "fill", "classify", "tag"]
"""Kind of answer of a trained model to a text: more text, words for its masks, a label, or a label for each word."""
Rows = Literal["labelled texts", "labelled words", "conversations", "preferences", "texts and answers"]
"""Content of a file of rows; each kind has its reader in learning/data/tasks.py."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings that the lengths of a sample depend on."""

    seq: int
    """data.seq_length"""
    texts: int
    """1, or 2 where rows have pairs of texts"""
    enclosed: bool
    """True if special tokens stand around each text."""
    mask_probability: float
    mean_span_length: float

    def spans(self) -> SpanLengths:
        return span_lengths(self.seq, self.mask_probability, self.mean_span_length)


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecord:
    name: str
    title: str
    families: tuple[str, ...]
    """Names of the families that can learn it; records of config/families.py."""
    answer: Answer
    rows: Rows | None = None
    """The rows of a task that it is fine-tuned on, tokenised when it begins; None: it reads a prepared corpus."""
    every_token: bool = False
    """True if every token is predicted from those before it: bits per byte and n-gram models can be compared."""
    special_tokens: tuple[str, ...] = ()
    """Names of the tokens that the tokenizer must have, whatever the family (config/special_tokens.py)."""
    sentinels: Callable[[SampleSettings], int] = lambda s: 0
    """<extra_id_0> … that are needed."""
    ends_input: bool = False
    """True if the encoder reads a text with its end token."""
    has_generator: bool = False
    """True if ELECTRA's small model learns beside it."""
    pairs: bool = False
    """True if a sample is two texts, told apart by their segments; it is also learned whether the second follows."""
    shortest: Callable[[SampleSettings], int] = lambda s: 1
    """The least data.seq_length."""
    shortest_holds: str = "a token"
    """Content of a sample of that length, in words."""
    usual_length: str = "512"
    corpus_tokens: Callable[[SampleSettings], int] = lambda s: s.seq + 1
    """The fewest tokens of a corpus that give a sample."""
    target_length: Callable[[SampleSettings], int] | None = None
    """Positions of the decoder of two stacks; None: as data.target_seq_length says."""
    prompt: str = "generate {run} {text}"
    """Command to try with a trained run. {text} is words of its text, {masked} the same with a masked word, {hollow}
    with a sentinel."""

    @property
    def masks(self) -> bool:
        """True if single tokens of the text are masked, and guessed where they stand."""
        return self.answer == "fill"

    @property
    def masks_spans(self) -> bool:
        """True if spans of the text are masked, each behind a sentinel: the decoder's length follows."""
        return self.target_length is not None

    @property
    def reads_target_seq(self) -> bool:
        """True if the decoder of two stacks has the length that data.target_seq_length says."""
        return self.target_length is None and any(
            FAMILIES[family].has_two_stacks
            for family in self.families
            if family in FAMILIES  # or of an extension
        )

    @property
    def chats(self) -> bool:
        """True if texts are conversations, in a chat template."""
        return self.rows in ("conversations", "preferences")

    @property
    def has_references(self) -> bool:
        """True if each row is compared with what the model that training starts from says of it."""
        return self.rows == "preferences"

    @property
    def has_labels(self) -> bool:
        """True if the model has a head over finetune.labels, scored by accuracy, F1 and MCC, and not one over words."""
        return self.answer in ("classify", "tag")


def _labelled_length(s: SampleSettings) -> int:
    """A token of each text, and what stands around and between them."""
    return s.texts + (s.texts + 1 if s.enclosed else s.texts - 1)


_MASKED = "generate {run} {masked}"
_ENCLOSED_TEXT = "its special tokens, and text"

OBJECTIVES: dict[str, ObjectiveRecord] = {
    record.name: record
    for record in (
        ObjectiveRecord(
            name="clm",
            title="next token",
            families=("gpt",),
            answer="write",
            every_token=True,
        ),
        ObjectiveRecord(
            name="mlm",
            title="masked tokens",
            families=("bert",),
            answer="fill",
            special_tokens=("cls", "sep", "mask"),
            shortest=lambda s: 3,
            shortest_holds=_ENCLOSED_TEXT,
            usual_length="512, as BERT",
            corpus_tokens=lambda s: s.seq - 2,
            prompt=_MASKED,
        ),
        ObjectiveRecord(
            name="mlm-nsp",
            title="masked tokens with next sentence",
            families=("bert",),
            answer="fill",
            special_tokens=("cls", "sep", "mask", "pad"),
            pairs=True,
            shortest=lambda s: 5,
            shortest_holds=_ENCLOSED_TEXT,
            usual_length="512, as BERT",
            corpus_tokens=lambda s: 6,  # two documents of three tokens
            prompt=_MASKED,
        ),
        ObjectiveRecord(
            name="rtd",
            title="replaced tokens",
            families=("electra",),
            answer="fill",
            special_tokens=("cls", "sep", "mask"),
            has_generator=True,
            shortest=lambda s: 3,
            shortest_holds=_ENCLOSED_TEXT,
            usual_length="512, as BERT",
            corpus_tokens=lambda s: s.seq - 2,
            prompt=_MASKED,
        ),
        ObjectiveRecord(
            name="spans",
            title="T5's masked spans",
            families=("t5",),
            answer="write",
            special_tokens=("pad", "end"),
            sentinels=lambda s: s.spans().spans,
            ends_input=True,
            shortest=lambda s: s.spans().inputs,
            shortest_holds="a token that is seen, a sentinel and the end",
            usual_length="512, as T5",
            corpus_tokens=lambda s: s.spans().tokens,
            target_length=lambda s: s.spans().targets,
            prompt="generate {run} {hollow}",
        ),
        ObjectiveRecord(
            name="prefix",
            title="how a text goes on",
            families=("t5",),
            answer="write",
            special_tokens=("pad",),
            shortest=lambda s: 2,
            shortest_holds="a beginning and how it goes on",
            usual_length="512, as T5",
        ),
        ObjectiveRecord(
            name="classify",
            title="classes of texts or pairs",
            families=("gpt", "bert", "electra"),
            answer="classify",
            rows="labelled texts",
            shortest=_labelled_length,
            shortest_holds="text and its special tokens",
            usual_length="128",
        ),
        ObjectiveRecord(
            name="tag",
            title="classes of words",
            families=("gpt", "bert", "electra"),
            answer="tag",
            rows="labelled words",
            shortest=_labelled_length,
            shortest_holds="text and its special tokens",
            usual_length="128",
        ),
        ObjectiveRecord(
            name="instruct",
            title="answers in a conversation",
            families=("gpt",),
            answer="write",
            rows="conversations",
            special_tokens=("end",),
            prompt="chat {run}",
        ),
        ObjectiveRecord(
            name="dpo",
            title="the chosen of two answers",
            families=("gpt",),
            answer="write",
            rows="preferences",
            special_tokens=("end",),
            shortest=lambda s: 2,
            shortest_holds="a token of each answer",
            usual_length="1024",
            prompt="chat {run}",
        ),
        ObjectiveRecord(
            name="seq2seq",
            title="from text to text",
            families=("t5",),
            answer="write",
            rows="texts and answers",
            special_tokens=("pad", "end"),
            ends_input=True,
        ),
    )
}


if TYPE_CHECKING:
    ObjectiveName = str
else:  # a record added to the table is a value of the key
    ObjectiveName = Literal[tuple(OBJECTIVES)]


def learned_by(family: str, answer: Answer | None = None) -> tuple[str, ...]:
    """Names of the family's objectives, or of those with that answer: for pre-training, then for fine-tuning."""
    learned = (record for record in OBJECTIVES.values() if family in record.families)
    return tuple(record.name for record in learned if answer in (None, record.answer))


def named(fits: Callable[[ObjectiveRecord], bool]) -> str:
    """The objectives that fit, as a message says them: `clm or instruct`."""
    return " or ".join(name for name, record in OBJECTIVES.items() if fits(record))


def writing_decoders() -> str:
    return named(lambda r: r.answer == "write" and any(FAMILIES[f].is_decoder for f in r.families))
