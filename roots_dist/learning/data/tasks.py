"""Rows of a fine-tuning task, read, checked and tokenized once; the objectives build samples from them.

    rows.py --columns of finetune.*, each row checked--> texts, labels --tokenizer--> Examples(path, rows)

All rows are checked before the first process group exists: the first invalid row raises an error with its file and
line, or is counted (finetune.on_error). Texts are truncated later, by the objectives (objectives/): a long text is not
an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from roots_dist.config.extensions import extended
from roots_dist.config.objectives import Rows
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError, Problem, present
from roots_dist.learning.data.chat import open_chat
from roots_dist.learning.data.columns import EXAMPLES
from roots_dist.learning.data.conversations import FORMATS, TextColumns, find_format, read_conversation, read_preference
from roots_dist.learning.data.remarks import Remarks
from roots_dist.learning.data.rows import Row, rows
from roots_dist.learning.data.specials import Specials, read_specials
from roots_dist.learning.data.tokenizer import Codec, load_codec
from roots_dist.learning.data.turns import ConversationEncoder, Turns

BATCH_TEXTS = 1024
"""Number of texts that are tokenized at a time."""
NUMBER = re.compile(r"-?\d{1,18}")
"""A label that is a number; with more digits it is a word."""


class Example(NamedTuple):
    """One row as int32 ids without special tokens."""

    first: np.ndarray
    """The text, or the whole conversation; the one with the chosen answer (dpo)."""
    second: np.ndarray | None = None
    """The second text of a pair, the answer (seq2seq), or the conversation with the rejected answer (dpo)."""
    token_labels: np.ndarray | None = None
    """The label of each id of `first`, or IGNORE (tag); 1 for each id that is a target (instruct, dpo)."""
    second_labels: np.ndarray | None = None
    """The same as token_labels for `second` (dpo)."""
    label: int = 0
    """Index of the class (classify)."""
    place: str = ""
    """File and line (instruct, dpo)."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a file."""

    prefix: str
    rows: tuple[Example, ...]
    remarks: tuple[str, ...] = ()
    """Remarks on the file: its format, what was not read, and which rows were skipped."""
    references: np.ndarray | None = None
    """float64 [rows, 2]: log-probabilities of both answers of each row, of the model that training starts from (dpo)"""

    def __len__(self) -> int:
        return len(self.rows)


def open_examples(path: str, config: Config) -> Examples:
    """Read a file of examples, once per process. Raises DataError for the first invalid row."""
    stamp = tuple((str(p), _stamp(p)) for p in (path, config.data.tokenizer, config.finetune.chat_template) if p)
    return _read_examples(
        path,
        present(objective_of(config).rows),
        columns_of(config),
        config.data.tokenizer,
        config.model.vocab,
        stamp,
        "data.validation" if path in [source.path for source in config.data.validation] else "data.train",
        config.advanced.extensions,
    )


def collect_labels(paths: Sequence[str], config: Config) -> tuple[str, ...]:
    """All labels in these files, sorted, numbers by their value: the same order in every process. Raises DataError
    if there is none."""
    found: set[str] = set()
    columns, words = columns_of(config), objective_of(config).rows == "labelled words"
    remarks = Remarks(skip=columns.skip)
    for path in paths:
        for row in rows(path, remarks, "data.train", config.extension.readers):
            with remarks.of_row():
                found.update(_tags(row, columns) if words else [_label(row, columns.label)])
    if not found:
        raise _no_rows(", ".join(paths), present(objective_of(config).rows), "data.train", remarks)
    return tuple(sorted(found, key=lambda label: (0, int(label), label) if NUMBER.fullmatch(label) else (1, 0, label)))


class Columns(NamedTuple):
    """Names of the columns, and the other options that examples depend on."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    template: str | None
    format: str
    turns: Turns
    chat_date: str | None
    skip: bool
    """True if invalid rows are skipped."""


def columns_of(config: Config) -> Columns:
    f = config.finetune
    skip = f.on_error == "skip"
    return Columns(
        f.text_column, f.pair_column, f.label_column, f.labels, f.chat_template, f.format, f.turns, f.chat_date, skip
    )


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
        return found.st_mtime_ns, found.st_size
    except OSError:
        return 0, 0


@cache
def _read_examples(
    path: str,
    kind: Rows,
    columns: Columns,
    tokenizer: str,
    vocab: int,
    stamp: object,
    key: str,
    extensions: tuple[str, ...],
) -> Examples:
    """key: that of the config which names the file. stamp: times and sizes of all files that the examples depend on, so
    that a changed file is read again. extensions: files that may have a reader for this one."""
    codec, specials, remarks = load_codec(tokenizer), read_specials(tokenizer, vocab), Remarks(skip=columns.skip)
    given = rows(path, remarks, key, extended(extensions).readers)
    if kind not in ("conversations", "preferences"):  # which say themselves what they do not read
        given = _with_remarks(given, columns, remarks)
    examples = tuple(ROW_READERS[kind](given, columns, codec, specials, remarks))
    if not examples:
        raise _no_rows(path, kind, key, remarks)
    return Examples(path, examples, remarks.lines())


def _no_rows(path: str, kind: Rows, key: str, remarks: Remarks) -> DataError:
    skipped = f" ({remarks.lines()[-1]})" if remarks.skipped else ""
    fix = "correct the rows" if skipped else f"write rows into it, as {EXAMPLES[kind]}, or name another file"
    return DataError(Problem(key=key, found=path, expected=f"at least one row; it has none{skipped}", fix=fix))


def _with_remarks(given: Iterable[Row], columns: Columns, remarks: Remarks) -> Iterator[Row]:
    """The same rows; a column that is not read is a remark."""
    for row in given:
        for column in row.unread({columns.text, columns.pair, columns.label}):
            remarks.saw(f"column {column!r} is not read", row.place)
        yield row


def _labelled_texts(
    given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials, remarks: Remarks
) -> Iterable[Example]:
    numbers = {label: i for i, label in enumerate(columns.labels)}
    texts = (columns.text,) if columns.pair is None else (columns.text, columns.pair)

    def read(row: Row) -> tuple[list[str], int]:
        return [row.text(key) for key in texts], _number(row, columns.label, _label(row, columns.label), numbers)

    for row, (_, number), ids in _encode_rows(given, read, codec, remarks):
        with remarks.of_row():
            first, second, *_ = [*map(_to_array, [row] * len(ids), texts, ids), None]
            yield Example(first, second, label=number)


def _labelled_words(
    given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials, remarks: Remarks
) -> Iterable[Example]:
    numbers = {label: i for i, label in enumerate(columns.labels)}
    for row in given:
        with remarks.of_row():
            yield _tagged(row, columns, codec, numbers)


def _tagged(row: Row, columns: Columns, codec: Codec, numbers: dict[str, int]) -> Example:
    """An example of tagging. The label of a word belongs to its first token; its other tokens are not scored (Devlin et
    al. 2019, 5.3)."""
    words, labels = _word_list(row, columns.text), _tags(row, columns)
    ends = np.cumsum([len(word) + 1 for word in words])
    encoding = codec.backend.encode(" ".join(words), add_special_tokens=False)
    word_of = np.searchsorted(ends, [max(start, end - 1) for start, end in encoding.offsets], side="right")
    firsts = np.diff(word_of, prepend=-1) > 0
    lost = set(range(len(words))) - set(word_of.tolist())
    if lost:
        raise row.error(columns.text, words[min(lost)], "words that the tokenizer does not drop")
    number = np.array([_number(row, columns.label, label, numbers) for label in labels])
    return Example(
        np.array(encoding.ids, np.int32), token_labels=np.where(firsts, number[word_of], -100).astype(np.int32)
    )


def _conversations(
    given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials, remarks: Remarks
) -> Iterable[Example]:
    """One example for each conversation, or for each answer (finetune.turns=each)."""
    encoder = _encoder(columns, codec, specials, remarks)
    texts = TextColumns(columns.text, columns.label)
    for row in given:
        with remarks.of_row():
            form = FORMATS.get(columns.format) or find_format(row, texts)
            remarks.saw(f"read as {form.title} (finetune.format={form.name})", row.place)
            for ids, learned in list(encoder.examples(row, read_conversation(row, form, texts, remarks))):
                yield Example(ids, token_labels=learned, place=row.place)


def _encoder(columns: Columns, codec: Codec, specials: Specials, remarks: Remarks) -> ConversationEncoder:
    date = columns.chat_date
    now = None if date is None else lambda: datetime.fromisoformat(date)
    end = present(codec.backend.id_to_token(present(specials.end)))
    chat = open_chat(columns.template, specials.name, end, now)
    return ConversationEncoder(chat, codec, specials, columns.turns, remarks)


def _preferences(
    given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials, remarks: Remarks
) -> Iterable[Example]:
    """One example for each pair."""
    encoder = _encoder(columns, codec, specials, remarks)
    for row in given:
        with remarks.of_row():
            pair = read_preference(row, remarks)
            ((ids, learned), (others, others_learned)) = (one for text in pair for one in encoder.examples(row, text))
            yield Example(ids, others, learned, others_learned, place=row.place)


def _answers(
    given: Iterable[Row], columns: Columns, codec: Codec, specials: Specials, remarks: Remarks
) -> Iterable[Example]:
    both = (columns.text, columns.label)

    def read(row: Row) -> tuple[list[str], None]:
        return [row.text(key) for key in both], None

    for row, _, ids in _encode_rows(given, read, codec, remarks):
        with remarks.of_row():
            first, second = map(_to_array, [row, row], both, ids)
            yield Example(first, second)


ROW_READERS: dict[Rows, Callable[..., Iterable[Example]]] = {
    "labelled texts": _labelled_texts,
    "labelled words": _labelled_words,
    "conversations": _conversations,
    "preferences": _preferences,
    "texts and answers": _answers,
}
"""Kind of rows -> function (rows, columns, codec, specials, remarks) -> examples."""


Made = TypeVar("Made")


def _encode_rows(
    given: Iterable[Row], read: Callable[[Row], tuple[list[str], Made]], codec: Codec, remarks: Remarks
) -> Iterator[tuple[Row, tuple[list[str], Made], list[list[int]]]]:
    """Each row, the result of `read` (texts, anything), and the ids of the texts, tokenized in batches."""

    def valid() -> Iterator[tuple[Row, tuple[list[str], Made]]]:
        for row in given:
            with remarks.of_row():
                yield row, read(row)

    rows_read = valid()
    while some := list(islice(rows_read, BATCH_TEXTS)):
        flat = [text for _, (texts, _) in some for text in texts]
        ids = iter(codec.backend.encode_batch_fast(flat, add_special_tokens=False))
        for row, made in some:
            yield row, made, [next(ids).ids for _ in made[0]]


def _to_array(row: Row, key: str, ids: list[int]) -> np.ndarray:
    if not ids:
        raise row.error(key, row.values[key], "text that the tokenizer does not drop")
    return np.array(ids, np.int32)


def _label(row: Row, key: str) -> str:
    return _one_label(row, key, row.value(key))


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
    value = row.value(key)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise row.error(key, value, "a list of words, none of them empty, or a text")
    return words


def _tags(row: Row, columns: Columns) -> list[str]:
    words, value = _word_list(row, columns.text), row.value(columns.label)
    labels = value.split() if isinstance(value, str) else value
    if not isinstance(labels, list):
        raise row.error(columns.label, value, "a list of labels, one for each word")
    if len(labels) != len(words):
        raise row.error(
            columns.label, f"{len(labels)} labels", f"one for each of the {len(words)} words of {columns.text}"
        )
    return [_one_label(row, columns.label, label) for label in labels]
