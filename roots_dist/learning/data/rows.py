"""Rows out of a file of examples: jsonl, csv or tsv, packed or not, each with the line that it stands in.

    path --rows--> Row(values, file, line), Row, … --> learning/data/tasks.py

The first thing that is no row ends it: a DataError with file and line.
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
from roots_dist.learning.data.readers import LONGEST, parsed_object

LONG = 120
"""Characters of a value that a message shows."""
QUOTED = re.compile(r'"(?:[^"]|"")*"')
"""A field as csv writers quote it: quotes within are doubled."""


@dataclass(frozen=True)
class Row:
    values: Mapping[str, object]
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def wrong(self, key: str, found: object, expected: str, fix: str = "correct this line") -> DataError:
        """key: the column."""
        if len(str(found)) > LONG:
            found = f"{str(found)[:LONG]}…"
        return DataError(Problem(key=f"{self.place}: {key}", found=found, expected=expected, fix=fix))


def rows(path: str | Path) -> Iterator[Row]:
    """Every row, in order. Raises DataError for what cannot be read."""
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
    """A JSON object on each line. Blank lines are passed over."""
    for number, data in enumerate(content, 1):
        if data.strip():
            value = parsed_object(data)
            if not isinstance(value, dict):
                expected = f"a JSON object ({': '.join(value)})"
                raise DataError(
                    Problem(key=f"{file}:{number}", found=_short(data), expected=expected, fix="correct this line")
                )
            if b"\\u" in data and not _encodes(value):
                expected = "valid Unicode (half of a surrogate pair is none)"
                raise DataError(
                    Problem(key=f"{file}:{number}", found=_short(data), expected=expected, fix="correct this line")
                )
            yield number, value


def _encodes(value: dict[str, Any]) -> bool:
    """JSON can spell half a surrogate pair, which no encoding holds."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    return text if len(text) <= 40 else f"{text[:40]}…"


def _table(delimiter: str, name: str) -> Callable[[BufferedIOBase, str], Iterator[tuple[int, dict[str, Any]]]]:
    """The first line names the columns. name: of the delimiter, in words."""

    def read(content: BufferedIOBase, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(LONGEST)  # a text may be longer than the library's 131,072 characters
        lines: TextIO = io.TextIOWrapper(cast("BinaryIO", content), "utf-8-sig", newline="")
        line = 0
        try:
            quoting: Quoting = csv.QUOTE_MINIMAL
            if delimiter == "\t":
                text = lines.read()
                lines, quoting = io.StringIO(text, newline=""), _quoting(text)
            reader = csv.DictReader(lines, delimiter=delimiter, quoting=quoting, strict=True)
            _refuse_twins(reader.fieldnames or (), file)
            line = 1
            for values in reader:
                line = reader.line_num
                if None in values:
                    columns = len(reader.fieldnames or ())
                    problem = Problem(
                        key=f"{file}:{line}", found=f"{columns + len(values[None])} fields",
                        expected=f"{columns}, as in the first line", fix=f"put what holds a {name} into quotes",
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
    """What quotes mean in a tsv: characters, as in GLUE's files, or csv's, as where a writer quoted each field that
    holds one.

    Read as characters, a line whose field held a tab or a line break has other fields than the first: then they are
    csv's, if the whole file is csv. Else they are csv's where every field that has any is quoted in full.
    """
    plain = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE) if line]
    if _even(plain):
        in_full = all(QUOTED.fullmatch(field) for line in plain for field in line if '"' in field)
        return csv.QUOTE_MINIMAL if in_full else csv.QUOTE_NONE
    try:
        whole = _even(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        whole = False
    return csv.QUOTE_MINIMAL if whole else csv.QUOTE_NONE


def _even(lines: Iterable[list[str]]) -> bool:
    return len({len(line) for line in lines if line}) <= 1


def _refuse_twins(columns: Sequence[str], file: str) -> None:
    """Of two columns with one name only the last would be read."""
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
"""By the ending of the name, under the archive's."""
