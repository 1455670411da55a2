"""Read documents from files, one at a time and with their place; what is not a document is reported as a Defect.

    inputs --find--> [path] --read--> Document | Defect, Document, … --> learning/data/prepare.py, which stops or counts

This file does not decide what happens to a defect, and does not hold a whole file in memory.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roots_dist.errors import DataError, Problem, missing_package, present
from roots_dist.learning.data import embedded
from roots_dist.learning.data.archives import OPENERS, DamagedArchive, open_bytes

MAX_BYTES = 1 << 28
"""Longest document in bytes. More indicates a file without line ends, or a decompression bomb."""


@dataclass(frozen=True)
class Document:
    """A text and where it was read."""

    text: str
    file: str
    line: int
    """Line, counted from 1: the row in a parquet file, 1 in a text file."""
    position: int
    """Bytes of the stored file that have been read so far, for the progress display."""


@dataclass(frozen=True)
class Defect:
    """A place in the input that does not yield a document."""

    file: str
    line: int
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


def find(inputs: Sequence[str | Path]) -> list[Path]:
    """Files behind the given files, folders, globs and `embedded:` names: in the given order, each file once."""
    found: dict[Path, Path] = {}
    for given in map(str, inputs):
        for path in _files_of(given):
            found.setdefault(path.resolve(), path)
    if not found:
        raise DataError(
            Problem(
                key="inputs",
                found=[],
                expected="at least one file, folder or glob",
                fix="name one, or embedded:state-of-the-union",
            )
        )
    return list(found.values())


def _files_of(given: str) -> list[Path]:
    if given.startswith(embedded.PREFIX):
        return [embedded.path_of(given)]
    path, kinds = Path(given), ", ".join(READERS)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _kind(p) and p.is_file() and not _hidden(p.relative_to(path)))
        if not files:
            raise DataError(
                Problem(key="input", found=given, expected=f"a folder with {kinds} files in it", fix="check the path")
            )
        return files
    if path.is_file():  # before the glob: a name may contain brackets
        matches = [path]
    else:
        matches = sorted(p for p in map(Path, glob.glob(given, recursive=True)) if p.is_file())
    if not matches:
        raise DataError(
            Problem(key="input", found=given, expected="a file, a folder or a glob that matches", fix="check the path")
        )
    for match in matches:
        if not _kind(match):
            expected = f"a name ending in one of {kinds}; all but parquet also with {', '.join(OPENERS)}"
            raise DataError(Problem(key="input", found=str(match), expected=expected, fix="rename or convert it"))
    return matches


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> str | None:
    """Key into READERS: the suffix before the compression suffix, if there is one."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    packed = len(suffixes) == 2 and suffixes[-1] in OPENERS
    kind = suffixes[0] if packed else suffixes[-1] if suffixes else ""
    return kind if kind in READERS and not (packed and kind == ".parquet") else None


def read(path: Path, text_key: str) -> Iterator[Document | Defect]:
    """Every document of a file, in order. If the rest of a file is unreadable, the last item is a single Defect."""
    line = 0
    try:
        for item in READERS[present(_kind(path))](path, text_key):
            line = item.line
            if isinstance(item, Document):
                item = _checked(item)
            yield item
    except DamagedArchive as error:
        yield Defect(str(path), line + 1, "truncated or damaged archive", str(error))
    except OSError as error:
        yield Defect(str(path), line + 1, "unreadable file", error.strerror or str(error))


def _checked(document: Document) -> Document | Defect:
    if not isinstance(document.text, str):
        return Defect(document.file, document.line, "text is not a string", type(document.text).__name__)
    if not document.text.strip():
        return Defect(document.file, document.line, "empty document")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:  # JSON can contain a lone surrogate, which cannot be encoded
        return Defect(document.file, document.line, "text is not valid Unicode", f"lone surrogate at {error.start}")
    return document


def _text(path: Path, text_key: str) -> Iterator[Document | Defect]:
    """One document per file. `text_key` is ignored."""
    with open_bytes(path) as (content, raw):
        data = content.read(MAX_BYTES + 1)
        position = raw.tell()
    if len(data) > MAX_BYTES:
        yield Defect(str(path), 1, "document too long", f"more than {MAX_BYTES:,} bytes; split the file")
        return
    try:
        yield Document(data.decode("utf-8-sig"), str(path), 1, position)
    except UnicodeDecodeError as error:
        yield Defect(str(path), data.count(b"\n", 0, error.start) + 1, "bad UTF-8", f"at byte {error.start}")


def _lines(path: Path, text_key: str) -> Iterator[Document | Defect]:
    """One JSON object per line, with the text under `text_key`. Blank lines are skipped."""
    file = str(path)
    with open_bytes(path) as (content, raw):
        number = 0
        while data := content.readline(MAX_BYTES + 1):
            number += 1
            if len(data) > MAX_BYTES:
                while data and not data.endswith(b"\n"):
                    data = content.readline(MAX_BYTES)
                yield Defect(file, number, "document too long", f"more than {MAX_BYTES:,} bytes in a line")
            elif data.strip():
                item = _object(data, text_key)
                if isinstance(item, dict):
                    yield Document(item[text_key], file, number, raw.tell())
                else:
                    yield Defect(file, number, *item)


def parsed_object(data: bytes) -> dict[str, Any] | tuple[str, str]:
    """The JSON object of a line; or what is wrong with it, as (kind, detail)."""
    try:
        value = json.loads(data.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return "bad UTF-8", f"at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        return "corrupt JSON", f"{error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        return "corrupt JSON", str(error)
    if not isinstance(value, dict):
        return "not a JSON object", f"{type(value).__name__}; one object per line is expected"
    return value


def _object(data: bytes, text_key: str) -> dict[str, Any] | tuple[str, str]:
    """The JSON object of a line, which must have the key; or what is wrong with it."""
    value = parsed_object(data)
    if isinstance(value, dict) and text_key not in value:
        return "missing key", f"{text_key!r}; there are {sorted(value)[:8]}"
    return value


def _rows(path: Path, text_key: str) -> Iterator[Document | Defect]:
    """One document per row of a parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("pyarrow", "formats") from error
    file, size = str(path), path.stat().st_size
    try:
        with parquet.ParquetFile(path) as table:
            if text_key not in table.schema_arrow.names:
                yield Defect(file, 1, "missing key", f"{text_key!r}; there are columns {table.schema_arrow.names[:8]}")
                return
            number, total = 0, max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for cell in batch.column(0):
                    number += 1
                    try:
                        yield Document(cell.as_py(), file, number, size * number // total)
                    except UnicodeDecodeError as error:
                        yield Defect(file, number, "bad UTF-8", f"at byte {error.start}")
    except pyarrow.ArrowException as error:
        raise DamagedArchive(str(error).splitlines()[0]) from error


READERS: dict[str, Callable[[Path, str], Iterator[Document | Defect]]] = {
    ".txt": _text,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _lines,
    ".parquet": _rows,
}
"""Reader for each file suffix. `.json` is read by lines too, because corpora under this name are JSON lines."""
