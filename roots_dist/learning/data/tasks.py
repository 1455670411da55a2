"""Rows of a fine-tuning task, read, checked and tokenized once; the objectives build samples from them.

    rows.py --columns of finetune.*, each row checked--> texts, labels --tokenizer--> Examples(path, rows)

All rows are checked before the first process group exists: the first invalid row raises an error with its file and
line. Texts are truncated later, by the objectives (objectives/): a long text is not an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from roots_dist.config.objectives import Rows
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError, Problem, present
from roots_dist.learning.data.chat import encode_turns, open_chat
from roots_dist.learning.data.rows import Row, rows
from roots_dist.learning.data.specials import Specials, read_specials
from roots_dist.learning.data.tokenizer import Codec, load_codec

BATCH_TEXTS = 1024
"""Number of texts that are tokenized at a time."""
NUMBER = re.compile(r"-?\d{1,18}")
"""A label that is a number; with more digits it is a word."""
ROLES = ("system", "user", "assistant", "tool")


class Example(NamedTuple):
    """One row as int32 ids without special tokens."""

    first: np.ndarray
    """The text, or the whole conversation."""
    second: np.ndarray | None = None
    """The second text of a pair, or the answer (seq2seq)."""
    token_labels: np.ndarray | None = None
    """For each id of `first`: its label or IGNORE (tag), or 1 if it is a target (instruct)."""
    label: int = 0
    """Index of the class (classify)."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a file."""

    prefix: str
    rows: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.rows)


def open_examples(path: str, config: Config) -> Examples:
    """Read a file of examples, once per process. Raises DataError for the first invalid row."""
    stamp = tuple((str(p), _stamp(p)) for p in (path, config.data.tokenizer, config.finetune.chat_template) if p)
    return _read_examples(
        path, present(objective_of(config).rows), columns_of(config), config.data.tokenizer, config.model.vocab, stamp
    )


def collect_labels(paths: Sequence[str], config: Config) -> tuple[str, ...]:
    """All labels in these files, sorted, numbers by their value: the same order in every process."""
    found: set[str] = set()
    for path in paths:
        for row in rows(path):
            values = (
                _tags(row, columns_of(config))
                if objective_of(config).rows == "labelled words"
                else [_label(row, config.finetune.label_column)]
            )
            found.update(values)
    return tuple(sorted(found, key=lambda label: (0, int(label), label) if NUMBER.fullmatch(label) else (1, 0, label)))


class Columns(NamedTuple):
    """Names of the columns, and the other options that examples depend on."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    template: str | None


def columns_of(config: Config) -> Columns:
    f = config.finetune
    return Columns(f.text_column, f.pair_column, f.label_column, f.labels, f.chat_template)


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
        return found.st_mtime_ns, found.st_size
    except OSError:
        return 0, 0


@lru_cache(maxsize=8)
def _read_examples(path: str, kind: Rows, columns: Columns, tokenizer: str, vocab: int, stamp: object) -> Examples:
    """stamp: times and sizes of all files that the examples depend on, so that a changed file is read again."""
    codec, specials = load_codec(tokenizer), read_specials(tokenizer, vocab)
    examples = tuple(ROW_READERS[kind](rows(path), columns, codec, specials))
    if not examples:
        raise DataError(Problem(key="rows", found=0, expected=f"at least one in {path}", fix="check the file"))
    return Examples(path, examples)


def _labelled_texts(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    numbers = {label: i for i, label in enumerate(columns.labels)}
    texts = (columns.text,) if columns.pair is None else (columns.text, columns.pair)

    def read(row: Row) -> tuple[list[str], int]:
        return [_text(row, key) for key in texts], _number(row, columns.label, _label(row, columns.label), numbers)

    for row, (_, number), ids in _encode_rows(given, read, codec):
        first, second, *_ = [*map(_to_array, [row] * len(ids), texts, ids), None]
        yield Example(first, second, label=number)


def _labelled_words(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    """Examples of tagging. The label of a word belongs to its first token; its other tokens are not scored (Devlin et
    al. 2019, 5.3)."""
    numbers = {label: i for i, label in enumerate(columns.labels)}
    for row in given:
        words, labels = _word_list(row, columns.text), _tags(row, columns)
        ends = np.cumsum([len(word) + 1 for word in words])
        encoding = codec.backend.encode(" ".join(words), add_special_tokens=False)
        word_of = np.searchsorted(ends, [max(start, end - 1) for start, end in encoding.offsets], side="right")
        firsts = np.diff(word_of, prepend=-1) > 0
        lost = set(range(len(words))) - set(word_of.tolist())
        if lost:
            raise row.error(columns.text, words[min(lost)], "words that the tokenizer does not drop")
        number = np.array([_number(row, columns.label, label, numbers) for label in labels])
        yield Example(
            np.array(encoding.ids, np.int32), token_labels=np.where(firsts, number[word_of], -100).astype(np.int32)
        )


def _conversations(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    end = present(codec.backend.id_to_token(present(specials.end)))
    chat = open_chat(columns.template, specials.name, end)
    ends = frozenset(np.flatnonzero(specials.special).tolist())
    for row in given:
        try:
            turns = chat.turns(_messages(row, columns))
        except ValueError as error:
            raise row.error(
                columns.text, "a conversation", str(error), "correct this line, or give another finetune.chat_template"
            ) from error
        ids, learned = encode_turns(turns, codec, ends)
        yield Example(np.array(ids, np.int32), token_labels=np.array(learned, np.int32))


def _answers(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    both = (columns.text, columns.label)

    def read(row: Row) -> tuple[list[str], None]:
        return [_text(row, key) for key in both], None

    for row, _, ids in _encode_rows(given, read, codec):
        first, second = map(_to_array, [row, row], both, ids)
        yield Example(first, second)


ROW_READERS: dict[Rows, Callable[..., Iterable[Example]]] = {
    "labelled texts": _labelled_texts,
    "labelled words": _labelled_words,
    "conversations": _conversations,
    "texts and answers": _answers,
}
"""What the rows hold -> function (rows, columns, codec, specials) -> examples."""


Made = TypeVar("Made")


def _encode_rows(
    given: Iterable[Row], read: Callable[[Row], tuple[list[str], Made]], codec: Codec
) -> Iterator[tuple[Row, tuple[list[str], Made], list[list[int]]]]:
    """Each row, the result of `read` (texts, anything), and the ids of the texts, tokenized in batches."""
    given = iter(given)
    while some := [(row, read(row)) for row in islice(given, BATCH_TEXTS)]:
        flat = [text for _, (texts, _) in some for text in texts]
        ids = iter(codec.backend.encode_batch_fast(flat, add_special_tokens=False))
        for row, made in some:
            yield row, made, [next(ids).ids for _ in made[0]]


def _to_array(row: Row, key: str, ids: list[int]) -> np.ndarray:
    if not ids:
        raise row.error(key, row.values[key], "text that the tokenizer does not drop")
    return np.array(ids, np.int32)


def _value(row: Row, key: str) -> object:
    if key not in row.values:
        present = ", ".join(map(str, row.values)) or "none"
        raise row.error(
            key,
            None,
            f"a column of this name; the file has {present}",
            "name it with finetune.text_column, finetune.pair_column or finetune.label_column",
        )
    return row.values[key]


def _text(row: Row, key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str) or not value.strip():
        raise row.error(key, value, "text that is not empty")
    return value


def _label(row: Row, key: str) -> str:
    return _one_label(row, key, _value(row, key))


def _one_label(row: Row, key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise row.error(key, value, "a label: a word or a whole number")


def _number(row: Row, key: str, label: str, numbers: dict[str, int]) -> int:
    if label not in numbers:
        shown = ", ".join(list(numbers)[:8]) + (" …" if len(numbers) > 8 else "")
        fix = "correct this line; labels are those of data.train, or finetune.labels"
        raise row.error(key, label, f"one of the {len(numbers)} labels {shown}", fix)
    return numbers[label]


def _word_list(row: Row, key: str) -> list[str]:
    """A list of words, or a text that is split at white space."""
    value = _value(row, key)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise row.error(key, value, "a list of words, none of them empty, or a text")
    return words


def _tags(row: Row, columns: Columns) -> list[str]:
    words, value = _word_list(row, columns.text), _value(row, columns.label)
    labels = value.split() if isinstance(value, str) else value
    if not isinstance(labels, list):
        raise row.error(columns.label, value, "a list of labels, one for each word")
    if len(labels) != len(words):
        raise row.error(
            columns.label, f"{len(labels)} labels", f"one for each of the {len(words)} words of {columns.text}"
        )
    return [_one_label(row, columns.label, label) for label in labels]


def _messages(row: Row, columns: Columns) -> list[dict[str, str]]:
    """Messages of a conversation: the column `messages`, or finetune.text_column if it contains a list; otherwise
    question and answer."""
    key = "messages" if columns.text not in row.values and "messages" in row.values else columns.text
    value = _value(row, key)
    if not isinstance(value, list):
        return [
            {"role": "user", "content": _text(row, key)},
            {"role": "assistant", "content": _text(row, columns.label)},
        ]
    for message in value:
        role, content = (message.get(k) for k in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise row.error(key, message, f"messages with a role ({', '.join(ROLES)}) and content that is not empty")
    if not any(message["role"] == "assistant" for message in value):
        raise row.error(key, f"{len(value)} messages", "at least one of the assistant, to learn from")
    return value
