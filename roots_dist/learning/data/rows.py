"""Rows of a file of examples: jsonl, csv or tsv, compressed or not, each with its line number.

    path --rows--> Row(values, file, line), Row, … --> learning/data/tasks.py

The first invalid row raises a DataError with file and line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from roots_dist.errors import DataError, Problem
from roots_dist.files import why
from roots_dist.learning.data.archives import OPENERS, DamagedArchive, open_bytes
from roots_dist.learning.data.readers import MAX_BYTES, parsed_object

MAX_SHOWN = 120
"""Number of characters of a value that an error message shows."""
QUOTED = re.compile(r'"(?:[^"]|"")*"')
"""A field as csv writers quote it, with inner quotes doubled."""


@dataclass(frozen=True)
class Row:
    """One row, and where it was read."""

    values: Mapping[str, object]
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, key: str, found: object, expected: str, fix: str = "correct this line") -> DataError:
        """Error for a column of this row. key: the column."""
        if len(str(found)) > MAX_SHOWN:
            found = f"{str(found)[:MAX_SHOWN]}…"
        return DataError(Problem(key=f"{self.place}: {key}", found=found, expected=expected, fix=fix))


def rows(path: str | Path) -> Iterator[Row]:
    """Every row, in order. Raises DataError if the file or a row cannot be read."""
    file = Path(path)
    reader, line = READERS[_kind(file)], 0
    try:
        with open_bytes(file) as (content, _):
            for line, values in reader(content, str(file)):
                yield Row(values, str(file), line)
    except DamagedArchive as error:
        raise _unreadable(file, f"a whole archive ({error})", line + 1) from error
    except OSError as error:
        raise _unreadable(file, f"a file that can be read ({why(error)})") from error


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in OPENERS), "")
    if kind not in READERS:
        raise _unreadable(path, f"a name ending in one of {', '.join(READERS)}, packed as {', '.join(OPENERS)} or not")
    return kind


def _unreadable(path: Path, expected: str, line: int | None = None) -> DataError:
    key = "examples" if line is None else f"{path}:{line}"
    return DataError(Problem(key=key, found=str(path), expected=expected, fix="check the path, or make the file again"))


def _lines(content: BufferedIOBase, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """One JSON object per line. Blank lines are skipped."""
    for number, data in enumerate(content, 1):
        if data.strip():
            value = parsed_object(data)
            if not isinstance(value, dict):
                expected = f"a JSON object ({': '.join(value)})"
                raise DataError(
                    Problem(key=f"{file}:{number}", found=_short(data), expected=expected, fix="correct this line")
                )
            if b"\\u" in data and not _is_valid_unicode(value):
                expected = "valid Unicode (this has a lone surrogate)"
                raise DataError(
                    Problem(key=f"{file}:{number}", found=_short(data), expected=expected, fix="correct this line")
                )
            yield number, value


def _is_valid_unicode(value: dict[str, Any]) -> bool:
    """JSON can contain a lone surrogate, which cannot be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    return text if len(text) <= 40 else f"{text[:40]}…"


def _table(delimiter: str, name: str) -> Callable[[BufferedIOBase, str], Iterator[tuple[int, dict[str, Any]]]]:
    """Reader for a table whose first line names the columns. name: the delimiter in words."""

    def read(content: BufferedIOBase, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(MAX_BYTES)  # the library's default limit is 131,072 characters
        lines: TextIO = io.TextIOWrapper(cast("BinaryIO", content), "utf-8-sig", newline="")
        line = 0
        try:
            quoting: Quoting = csv.QUOTE_MINIMAL
            if delimiter == "\t":
                text = lines.read()
                lines, quoting = io.StringIO(text, newline=""), _quoting(text)
            reader = csv.DictReader(lines, delimiter=delimiter, quoting=quoting, strict=True)
            _refuse_duplicate_columns(reader.fieldnames or (), file)
            line = 1
            for values in reader:
                line = reader.line_num
                if None in values:
                    columns = len(reader.fieldnames or ())
                    problem = Problem(
                        key=f"{file}:{line}", found=f"{columns + len(values[None])} fields",
                        expected=f"{columns}, as in the first line", fix=f"quote the fields that contain a {name}",
                    )  # fmt: skip
                    raise DataError(problem)
                yield line, values
        except csv.Error as error:
            problem = Problem(
                key=f"{file}:{line + 1}", found="a row", expected=f"one of csv ({error})", fix="correct this line"
            )
            raise DataError(problem) from error
        except UnicodeDecodeError as error:
            problem = Problem(key=file, found="bytes", expected=f"UTF-8 ({error.reason})", fix="save the file as UTF-8")
            raise DataError(problem) from error

    return read


Quoting = Literal[0, 1, 2, 3]
"""csv.QUOTE_MINIMAL and its like."""


def _quoting(text: str) -> Quoting:
    """Meaning of quotes in a tsv file: literal characters, as in GLUE's files, or csv quoting.

    If, read literally, some line has another number of fields than the first, a quoted field contains a tab or a line
    break: quoting is csv's if the whole file is then valid csv. Otherwise quoting is csv's only if every field with a
    quote is quoted completely.
    """
    plain = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE) if line]
    if _is_rectangular(plain):
        in_full = all(QUOTED.fullmatch(field) for line in plain for field in line if '"' in field)
        return csv.QUOTE_MINIMAL if in_full else csv.QUOTE_NONE
    try:
        whole = _is_rectangular(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        whole = False
    return csv.QUOTE_MINIMAL if whole else csv.QUOTE_NONE


def _is_rectangular(lines: Iterable[list[str]]) -> bool:
    return len({len(line) for line in lines if line}) <= 1


def _refuse_duplicate_columns(columns: Sequence[str], file: str) -> None:
    """Raise DataError if two columns have the same name: only the last one would be read."""
    twins = sorted({name for name in columns if columns.count(name) > 1})
    if twins:
        problem = Problem(
            key=f"{file}:1", found=twins[0], expected="a name of its own for each column", fix="rename one of them"
        )
        raise DataError(problem)


READERS: dict[str, Callable[[BufferedIOBase, str], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _lines,
    ".csv": _table(",", "comma"),
    ".tsv": _table("\t", "tab"),
}
"""Reader for each file suffix, ignoring the compression suffix."""
