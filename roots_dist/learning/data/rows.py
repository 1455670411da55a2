"""Rows of a file of examples: jsonl, json, csv, tsv or parquet, each with its line number.

    path --rows--> Row(values, file, line), Row, … --> learning/data/tasks.py

An invalid row is handed to Remarks.reject, which raises its DataError or counts it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, TextIO, cast

from roots_dist.config.extensions import OwnReader
from roots_dist.errors import DataError, FileProblem, Problem, missing_package, present
from roots_dist.files import where, why
from roots_dist.learning.data.archives import OPENERS, DamagedArchive, open_bytes
from roots_dist.learning.data.columns import fix_of_column
from roots_dist.learning.data.json_objects import BLANK, DECODER, parsed_object
from roots_dist.learning.data.own_readers import FailedReader, own_reader, rows_of
from roots_dist.learning.data.readers import MAX_BYTES
from roots_dist.learning.data.remarks import Remarks

MAX_SHOWN = 120
"""Number of characters of a value that an error message shows."""
QUOTED = re.compile(r'"(?:[^"]|"")*"')
"""A field as csv writers quote it, with inner quotes doubled."""
SPACE = re.compile(r"[ \t\r\n]*")
FixOf = Callable[[str, Collection[str]], str]
"""(missing column, columns that there are) -> what to do"""


@dataclass(frozen=True)
class Row:
    """One row, and where it was read."""

    values: Mapping[str, object]
    file: str
    line: int
    before: Collection[str] = field(default=(), compare=False)
    """The columns of the rows before it in the file."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, key: str, found: object, expected: str, fix: str = "correct this line") -> DataError:
        """Error for a column of this row. key: the column."""
        if len(str(found)) > MAX_SHOWN:
            found = f"{str(found)[:MAX_SHOWN]}…"
        return DataError(Problem(key=f"{self.place}: {key}", found=found, expected=expected, fix=fix))

    def unread(self, read: Collection[str | None]) -> list[str]:
        """Columns besides those that are read, which have a value here."""
        return [key for key, value in self.values.items() if key not in read and value not in (None, "", [], {})]

    def value(self, key: str, fix_of: FixOf = fix_of_column) -> object:
        """The value of a column, which must be there. fix_of: what to do if no row has it."""
        if key in self.values:
            return self.values[key]
        there = ", ".join(map(str, self.values)) or "none"
        if key in self.before:
            raise self.error(key, None, f"a value, as in the rows before; this row has {there}")
        raise self.error(key, None, f"a column of this name; the file has {there}", fix_of(key, self.values))

    def text(self, key: str, fix_of: FixOf = fix_of_column) -> str:
        value = self.value(key, fix_of)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, value, "text that is not empty")
        return value


def rows(
    path: str | Path,
    remarks: Remarks | None = None,
    key: str = "rows",
    own: Mapping[str, OwnReader] = MappingProxyType({}),
) -> Iterator[Row]:
    """Every row, in order. Raises DataError if the file or a row cannot be read, unless `remarks` skips rows. key: what
    names the file, as data.train. own: readers of an extension, by suffix."""
    file, remarks = Path(path), remarks or Remarks()
    if (mine := own_reader(file, own, (*READERS, *OPENERS))) is not None:
        yield from _own_rows(mine, file, remarks, key)
        return
    reader, line = READERS[_kind(file, key)], 0
    before: set[str] = set()
    try:
        with open_bytes(file) as (content, _):
            for line, values in reader(content, str(file), remarks):
                yield Row(values, str(file), line, before)
                before.update(values)
    except DamagedArchive as error:
        remarks.reject(_unreadable(file, f"a whole archive ({error})", f"{file}:{line + 1}"))
    except OSError as error:
        raise _unreadable(file, f"a file that can be read ({why(error)}: {where(file)})", key) from error


def _own_rows(reader: OwnReader, file: Path, remarks: Remarks, key: str) -> Iterator[Row]:
    line = 0
    before: set[str] = set()
    if not file.is_file():
        raise _unreadable(file, f"a file that can be read: there is no {where(file)}", key)
    try:
        for line, values in rows_of(reader, file):
            yield Row(values, str(file), line, before)
            before.update(values)
    except FailedReader as error:
        remarks.reject(_unreadable(file, f"rows of the extension's reader ({error})", f"{file}:{line + 1}"))


def _kind(path: Path, key: str) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in OPENERS), "")
    if kind not in READERS or (kind == ".parquet" and suffixes[-1] != kind):
        kinds, packed = ", ".join(READERS), ", ".join(OPENERS)
        raise _unreadable(path, f"a name ending in one of {kinds}, packed as {packed} or not (parquet: not)", key)
    return kind


def _unreadable(path: Path, expected: str, key: str) -> DataError:
    return DataError(Problem(key=key, found=str(path), expected=expected, fix="check the path, or make the file again"))


Numbered = Iterator[tuple[int, dict[str, Any]]]
"""Line numbers, and the values of each row."""


def _lines(content: BufferedIOBase, file: str, remarks: Remarks) -> Numbered:
    """One JSON object per line. Blank lines are skipped."""
    return _objects(enumerate(content, 1), file, remarks)


def _objects(lines: Iterable[tuple[int, bytes]], file: str, remarks: Remarks) -> Numbered:
    for number, data in lines:
        if data.strip():
            value = parsed_object(data)
            if not isinstance(value, dict):
                remarks.reject(_bad_line(file, number, data, f"a JSON object ({': '.join(value)})"))
            elif b"\\u" in data and not _is_valid_unicode(value):
                remarks.reject(_bad_line(file, number, data, "valid Unicode (this has a lone surrogate)"))
            else:
                yield number, value


def _bad_line(file: str, line: int, data: bytes, expected: str) -> DataError:
    is_list = data.lstrip(BLANK).startswith(b"[") and not file.endswith(".json")
    fix = "correct this line" + (
        "; if the file is one list of objects, its name should end in .json" if is_list else ""
    )
    if line == 1 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        fix = f"save the file as UTF-8: iconv -f UTF-16 -t UTF-8 {file}"
    return DataError(Problem(key=f"{file}:{line}", found=_short(data), expected=expected, fix=fix))


def _json(content: BufferedIOBase, file: str, remarks: Remarks) -> Numbered:
    """A list of objects; or, as many files of this name have it, one object per line."""
    lines = enumerate(content, 1)
    number, first = next(((n, data) for n, data in lines if data.strip(BLANK)), (1, b""))
    if first.lstrip(BLANK).startswith(b"["):
        return _list(first + content.read(), number, file, remarks)
    return _objects(chain([(number, first)], lines), file, remarks)


def _list(data: bytes, line: int, file: str, remarks: Remarks) -> Numbered:
    """The objects of a JSON list, each with the line on which it begins. line: that of the first byte."""
    text, at, counted = "", 0, 0
    try:
        text = data.decode("utf-8-sig")
        at = _after_space(text, text.index("[") + 1)
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            value, end = DECODER.raw_decode(text, at)
            if not isinstance(value, dict):
                remarks.reject(_bad_line(file, line, text[at:end].encode(), "a list of JSON objects"))
            elif "\\u" in text[at:end] and not _is_valid_unicode(value):
                remarks.reject(
                    _bad_line(file, line, text[at:end].encode(), "valid Unicode (this has a lone surrogate)")
                )
            else:
                yield line, value
            at = _after_space(text, end)
            if text[at : at + 1] == ",":
                at = _after_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise ValueError("an object is followed by neither a comma nor the end of the list")
        if text[at + 1 :].strip():
            raise ValueError("something follows the list")
    except (ValueError, RecursionError) as error:  # of decoding too
        found, line = text[at:].encode() if text else data, line + text.count("\n", counted, at)
        remarks.reject(_bad_line(file, line, found, f"a list of JSON objects ({error})"))


def _after_space(text: str, at: int) -> int:
    return present(SPACE.match(text, at)).end()


def _parquet(content: BufferedIOBase, file: str, remarks: Remarks) -> Numbered:
    """The rows of a table. A field of a nested value that is null is one that the row does not have: a table has every
    field in every row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("pyarrow", "formats") from error
    number = 0
    try:
        with parquet.ParquetFile(content) as table:
            _refuse_duplicate_columns(table.schema_arrow.names, file)
            for batch in table.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield number, {key: _without_nulls(value) for key, value in values.items()}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DamagedArchive(str(error).splitlines()[0]) from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _is_valid_unicode(value: dict[str, Any]) -> bool:
    """True if the value can be encoded: JSON can contain a lone surrogate, which cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    return text if len(text) <= 40 else f"{text[:40]}…"


Reader = Callable[[BufferedIOBase, str, Remarks], Numbered]
"""(content, name of the file, remarks) -> rows"""


def _table(delimiter: str, name: str) -> Reader:
    """Reader for a table whose first line names the columns. name: the delimiter in words."""

    def read(content: BufferedIOBase, file: str, remarks: Remarks) -> Numbered:
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
            _refuse_other_delimiters(reader.fieldnames or (), file, name)
            line = 1
            for values in reader:
                line = reader.line_num
                if None in values:
                    columns = len(reader.fieldnames or ())
                    problem = FileProblem(
                        key=f"{file}:{line}", found=f"{columns + len(values[None])} fields",
                        expected=f"{columns}, as in the first line", fix=f"quote the fields that contain a {name}",
                    )  # fmt: skip
                    remarks.reject(DataError(problem))
                    continue
                yield line, values
        except csv.Error as error:
            found, fix = f"no row of csv ({error})", "correct this line"
            problem = FileProblem(key=f"{file}:{line + 1}", found=found, expected="one", fix=fix)
            raise DataError(problem) from error
        except UnicodeDecodeError as error:
            found, fix = f"no UTF-8 ({error.reason})", "save the file as UTF-8"
            problem = FileProblem(key=file, found=found, expected="a text in UTF-8", fix=fix)
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


def _refuse_other_delimiters(columns: Sequence[str], file: str, name: str) -> None:
    """Raise DataError for a first line that is parted by something else. name: the delimiter in words."""
    if len(columns) == 1 and (found := re.search(r"[;\t|,]", columns[0])):
        expected, fix = f"columns parted by a {name}, and not by {found[0]!r}", f"save it with a {name} between columns"
        raise DataError(Problem(key=f"{file}:1", found=columns[0], expected=expected, fix=fix))


READERS: dict[str, Reader] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table(",", "comma"),
    ".tsv": _table("\t", "tab"),
    ".parquet": _parquet,
}
"""Reader for each file suffix, ignoring the compression suffix."""
