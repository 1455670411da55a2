"""Rows out of a file of examples: jsonl, csv or tsv, packed or not, each with the line that it stands in.

    path --rows--> Row(values, file, line), Row, … --> data/tasks.py

The first thing that is no row ends it: a DataError with file and line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from roots_dist.data.archives import OPENERS, DamagedArchive, open_bytes
from roots_dist.data.readers import parsed_object
from roots_dist.errors import DataError, Problem


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
        raise _unreadable(file, f"a file that can be read ({(error.strerror or 'unreadable').lower()})") from error


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in OPENERS), "")
    if kind not in READERS:
        raise _unreadable(path, f"a name ending in one of {', '.join(READERS)}, packed as {', '.join(OPENERS)} or not")
    return kind


def _unreadable(path: Path, expected: str, line: int | None = None) -> DataError:
    key = "examples" if line is None else f"{path}:{line}"
    return DataError(Problem(key=key, found=str(path), expected=expected, fix="check the path, or make the file again"))


def _lines(content: BinaryIO, file: str) -> Iterator[tuple[int, dict]]:
    """A JSON object on each line. Blank lines are passed over."""
    for number, data in enumerate(content, 1):
        if data.strip():
            value = parsed_object(data)
            if not isinstance(value, dict):
                expected = f"a JSON object ({': '.join(value)})"
                raise DataError(Problem(key=f"{file}:{number}", found=_short(data), expected=expected, fix="correct this line"))
            yield number, value


def _short(data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    return text if len(text) <= 40 else f"{text[:40]}…"


def _table(delimiter: str) -> Callable[[BinaryIO, str], Iterator[tuple[int, dict]]]:
    """The first line names the columns."""

    def read(content: BinaryIO, file: str) -> Iterator[tuple[int, dict]]:
        reader = csv.DictReader(io.TextIOWrapper(content, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        line = 1
        try:
            for values in reader:
                line = reader.line_num
                if None in values:
                    columns = len(reader.fieldnames or ())
                    problem = Problem(
                        key=f"{file}:{line}", found=f"{columns + len(values[None])} fields",
                        expected=f"{columns}, as in the first line", fix="put what holds a comma into quotes",
                    )  # fmt: skip
                    raise DataError(problem)
                yield line, values
        except csv.Error as error:
            problem = Problem(key=f"{file}:{reader.line_num}", found="a row", expected=f"one of csv ({error})", fix="correct this line")
            raise DataError(problem) from error
        except UnicodeDecodeError as error:
            problem = Problem(key=f"{file}:{line + 1}", found="bytes", expected=f"UTF-8 ({error.reason})", fix="save the file as UTF-8")
            raise DataError(problem) from error

    return read


READERS: dict[str, Callable[[BinaryIO, str], Iterator[tuple[int, dict]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
"""By the ending of the name, under the archive's."""
