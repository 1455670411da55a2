"""Rows of a task, read, checked and tokenised once: what the objectives of fine-tuning make their samples of.

    rows.py --columns of finetune.*, each row checked--> texts, labels --tokenizer--> Examples(path, rows)

Everything is checked when it is read, before the first process group: the first row that cannot be learned is refused
with its file and line. Lengths are cut later, by the objectives (objectives/): a text that is too long is no mistake.
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

from roots_dist.config.schema import Config
from roots_dist.errors import DataError, Problem, present
from roots_dist.learning.data.chat import ids_of, open_chat
from roots_dist.learning.data.rows import Row, rows
from roots_dist.learning.data.specials import Specials, read_specials
from roots_dist.learning.data.tokenizer import Codec, load_codec

AT_ONCE = 1024
"""Texts that are tokenised in one go."""
NUMBER = re.compile(r"-?\d{1,18}")
"""A label that is one; with more digits it is a word."""
ROLES = ("system", "user", "assistant", "tool")


class Example(NamedTuple):
    """One row, int32 ids without special tokens."""

    first: np.ndarray
    """the text; of a conversation all of it"""
    second: np.ndarray | None = None
    """of a pair the other text, of seq2seq the answer"""
    marks: np.ndarray | None = None
    """of each id of `first`: tag, the label or IGNORE; instruct, 1 where it is to be learned"""
    label: int = 0
    """classify: number of the class"""


@dataclass(frozen=True, eq=False)
class Examples:
    """A file of examples."""

    prefix: str
    rows: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.rows)


def open_examples(path: str, config: Config) -> Examples:
    """Raises DataError for the first row that cannot be learned. Read once for each process, then remembered."""
    stamp = tuple((str(p), _stamp(p)) for p in (path, config.data.tokenizer, config.finetune.chat_template) if p)
    return _opened(path, config.objective.name, columns_of(config), config.data.tokenizer, config.model.vocab, stamp)


def labels_of(paths: Sequence[str], config: Config) -> tuple[str, ...]:
    """The labels that the rows of these files have, sorted; numbers by their size. One order in every process."""
    found: set[str] = set()
    for path in paths:
        for row in rows(path):
            values = (
                _tags(row, columns_of(config))
                if config.objective.name == "tag"
                else [_label(row, config.finetune.label_column)]
            )
            found.update(values)
    return tuple(sorted(found, key=lambda label: (0, int(label), label) if NUMBER.fullmatch(label) else (1, 0, label)))


class Columns(NamedTuple):
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
def _opened(path: str, task: str, columns: Columns, tokenizer: str, vocab: int, stamp: object) -> Examples:
    """stamp: of all files that it depends on, so that one that was written anew is read anew."""
    codec, specials = load_codec(tokenizer), read_specials(tokenizer, vocab)
    made = TASKS[task](rows(path), columns, codec, specials)
    found = tuple(made)
    if not found:
        raise DataError(Problem(key="rows", found=0, expected=f"at least one in {path}", fix="check the file"))
    return Examples(path, found)


def _classify(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    numbers = {label: i for i, label in enumerate(columns.labels)}
    texts = (columns.text,) if columns.pair is None else (columns.text, columns.pair)

    def read(row: Row) -> tuple[list[str], int]:
        return [_text(row, key) for key in texts], _number(row, columns.label, _label(row, columns.label), numbers)

    for row, (_, number), ids in _encoded(given, read, codec):
        first, second, *_ = [*map(_words, [row] * len(ids), texts, ids), None]
        yield Example(first, second, label=number)


def _tag(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    """The label of a word stands on its first token; the tokens after it are not scored (Devlin et al. 2019, 5.3)."""
    numbers = {label: i for i, label in enumerate(columns.labels)}
    for row in given:
        words, labels = _word_list(row, columns.text), _tags(row, columns)
        ends = np.cumsum([len(word) + 1 for word in words])
        encoding = codec.backend.encode(" ".join(words), add_special_tokens=False)
        word_of = np.searchsorted(ends, [max(start, end - 1) for start, end in encoding.offsets], side="right")
        firsts = np.diff(word_of, prepend=-1) > 0
        lost = set(range(len(words))) - set(word_of.tolist())
        if lost:
            raise row.wrong(columns.text, words[min(lost)], "words of which the tokenizer makes something")
        number = np.array([_number(row, columns.label, label, numbers) for label in labels])
        yield Example(np.array(encoding.ids, np.int32), marks=np.where(firsts, number[word_of], -100).astype(np.int32))


def _instruct(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    end = present(codec.backend.id_to_token(present(specials.end)))
    chat = open_chat(columns.template, specials.name, end)
    ends = frozenset(np.flatnonzero(specials.special).tolist())
    for row in given:
        try:
            turns = chat.turns(_messages(row, columns))
        except ValueError as error:
            raise row.wrong(
                columns.text, "a conversation", str(error), "correct this line, or give another finetune.chat_template"
            ) from error
        ids, learned = ids_of(turns, codec, ends)
        yield Example(np.array(ids, np.int32), marks=np.array(learned, np.int32))


def _seq2seq(given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials) -> Iterable[Example]:
    both = (columns.text, columns.label)

    def read(row: Row) -> tuple[list[str], None]:
        return [_text(row, key) for key in both], None

    for row, _, ids in _encoded(given, read, codec):
        first, second = map(_words, [row, row], both, ids)
        yield Example(first, second)


TASKS: dict[str, Callable[..., Iterable[Example]]] = {
    "classify": _classify,
    "tag": _tag,
    "instruct": _instruct,
    "seq2seq": _seq2seq,
}
"""By objective.name: (rows, columns, codec, specials) -> examples."""


Made = TypeVar("Made")


def _encoded(
    given: Iterable[Row], read: Callable[[Row], tuple[list[str], Made]], codec: Codec
) -> Iterator[tuple[Row, tuple[list[str], Made], list[list[int]]]]:
    """Each row, what `read` made of it (texts, something), and the ids of the texts: many rows in one go."""
    given = iter(given)
    while some := [(row, read(row)) for row in islice(given, AT_ONCE)]:
        flat = [text for _, (texts, _) in some for text in texts]
        ids = iter(codec.backend.encode_batch_fast(flat, add_special_tokens=False))
        for row, made in some:
            yield row, made, [next(ids).ids for _ in made[0]]


def _words(row: Row, key: str, ids: list[int]) -> np.ndarray:
    if not ids:
        raise row.wrong(key, row.values[key], "text of which the tokenizer makes something")
    return np.array(ids, np.int32)


def _value(row: Row, key: str) -> object:
    if key not in row.values:
        there = ", ".join(map(str, row.values)) or "none"
        raise row.wrong(
            key,
            None,
            f"such a column; there are {there}",
            "name it with finetune.text_column, finetune.pair_column or finetune.label_column",
        )
    return row.values[key]


def _text(row: Row, key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str) or not value.strip():
        raise row.wrong(key, value, "text that is not empty")
    return value


def _label(row: Row, key: str) -> str:
    return _one_label(row, key, _value(row, key))


def _one_label(row: Row, key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise row.wrong(key, value, "a label: a word or a whole number")


def _number(row: Row, key: str, label: str, numbers: dict[str, int]) -> int:
    if label not in numbers:
        shown = ", ".join(list(numbers)[:8]) + (" …" if len(numbers) > 8 else "")
        fix = "correct this line; labels are those of data.train, or finetune.labels"
        raise row.wrong(key, label, f"one of the {len(numbers)} labels {shown}", fix)
    return numbers[label]


def _word_list(row: Row, key: str) -> list[str]:
    """A list, or a text that is cut at white space."""
    value = _value(row, key)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise row.wrong(key, value, "a list of words, none of them empty, or a text")
    return words


def _tags(row: Row, columns: Columns) -> list[str]:
    words, value = _word_list(row, columns.text), _value(row, columns.label)
    labels = value.split() if isinstance(value, str) else value
    if not isinstance(labels, list):
        raise row.wrong(columns.label, value, "a list of labels, one for each word")
    if len(labels) != len(words):
        raise row.wrong(
            columns.label, f"{len(labels)} labels", f"one for each of the {len(words)} words of {columns.text}"
        )
    return [_one_label(row, columns.label, label) for label in labels]


def _messages(row: Row, columns: Columns) -> list[dict[str, str]]:
    """Of the column `messages`, or of finetune.text_column if that holds a list; else question and answer."""
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
            raise row.wrong(key, message, f"messages with a role ({', '.join(ROLES)}) and content that is not empty")
    if not any(message["role"] == "assistant" for message in value):
        raise row.wrong(key, f"{len(value)} messages", "at least one of the assistant, to learn from")
    return value
