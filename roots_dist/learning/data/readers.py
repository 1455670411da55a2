"""Read documents from files, one at a time and with their place; what is not a document is reported as a Defect.

    inputs --find--> [path] --read--> Document | Defect, Document, … --> learning/data/prepare.py, which stops or counts

This file does not decide what happens to a defect, and does not hold a whole file in memory.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Any

from roots_dist.config.extensions import OwnReader
from roots_dist.errors import DataError, Problem, missing_package, present
from roots_dist.learning.data import embedded
from roots_dist.learning.data.archives import OPENERS, DamagedArchive, open_bytes
from roots_dist.learning.data.json_objects import (
    BLANK,
    MISSING,
    likely_text_key,
    listed_objects,
    parsed_object,
    value_at,
)
from roots_dist.learning.data.own_readers import FailedReader, own_reader, rows_of

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
    fix: str = "correct it"
    row: Mapping[str, Any] | None = None
    """The object, or what of it was read, that holds no text of a document."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


PLAIN = (".md", ".rst", ".log", ".text", ".tex", ".html", ".htm", ".xml", ".py", "")
"""Endings of files that are text, though no documents of theirs are known."""
NONE: Mapping[str, OwnReader] = MappingProxyType({})
"""No readers of an extension."""
PassedOver = Counter[str]
"""Kind of file that is not read -> number of such files."""


def find(
    inputs: Sequence[str | Path],
    passed_over: PassedOver | None = None,
    ours: Collection[Path] = (),
    own: Mapping[str, OwnReader] = NONE,
) -> list[Path]:
    """Files behind the given files, folders, globs and `embedded:` names: in the given order, each file once.

    passed_over counts what is not read. ours: files that are neither read nor counted, without links in their paths.
    own: readers of an extension, by suffix.
    """
    passed = Counter[str]() if passed_over is None else passed_over
    found: dict[Path, Path] = {}
    for given in map(str, inputs):
        for path in _files_of(given, passed, ours, own):
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


def _as_text(file: Path) -> str:
    """Say what to do about a file of another kind."""
    if file.suffix.lower() in PLAIN:
        return f"copy it under such a name: cp {quote(str(file))} {quote(str(file.with_suffix('.txt')))}"
    return "convert it to text"


def _files_of(given: str, passed: PassedOver, ours: Collection[Path], own: Mapping[str, OwnReader]) -> list[Path]:
    if given.startswith(embedded.PREFIX):
        return [embedded.path_of(given)]
    path, kinds = Path(given), ", ".join([*READERS, *own])
    if path.is_dir():
        here = Counter[str]()
        files = sorted(_in_folder(path, here, ours, own))
        passed += here
        if not files and not any(own.parent == path.resolve() for own in ours):
            expected = f"a folder with {kinds} files in it" + (f", not only {listed(here)}" if listed(here) else "")
            raise DataError(Problem(key="input", found=given, expected=expected, fix="check the path"))
        return files
    if path.is_file():  # before the glob: a name may contain brackets
        matches = [path]
    else:
        every = sorted(map(Path, glob.glob(given, recursive=True)))
        matches = [match for match in every if match.is_file() and match.resolve() not in ours]
        passed["folder that a glob matches"] += sum(match.is_dir() for match in every) if "**" not in given else 0
        passed["dead link"] += sum(match.is_symlink() and not match.exists() for match in every)
    if not matches:
        raise DataError(
            Problem(key="input", found=given, expected="a file, a folder or a glob that matches", fix="check the path")
        )
    for match in matches:
        if not _is_read(match, own):
            expected = f"a name ending in one of {kinds}; all but parquet also with {', '.join(OPENERS)}"
            raise DataError(Problem(key="input", found=str(match), expected=expected, fix=_as_text(match)))
    return matches


def _in_folder(
    folder: Path, passed: PassedOver, ours: Collection[Path], own: Mapping[str, OwnReader]
) -> Iterator[Path]:
    """Files in a folder and in those below it. Links to folders are followed, to each folder once."""

    def count_unreadable(error: OSError) -> None:
        passed["folder that cannot be read"] += 1

    names_of_ours, seen = {path.name for path in ours}, set[str]()
    for place, folders, names in os.walk(folder, onerror=count_unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in (*folders, *names) if name.startswith(".") and Path(real, name) not in ours]
        passed["hidden file or folder"] += len(hidden)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.name in names_of_ours and path.resolve() in ours:
                continue
            if path.is_file() and _is_read(path, own):
                yield path
            elif path.is_symlink() and not path.exists():
                passed["dead link"] += 1
            elif path.is_file():
                passed[f"file ending in {''.join(path.suffixes[-2:]) or 'nothing'}"] += 1
            else:
                passed["pipe, socket or device"] += 1


def listed(passed: PassedOver) -> str:
    """`2 × file ending in .md, 1 × dead link`"""
    most_first = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} × {what}" for what, count in most_first if count)


def _is_read(path: Path, own: Mapping[str, OwnReader]) -> bool:
    return own_reader(path, own, (*READERS, *OPENERS)) is not None or _kind(path) is not None


def _kind(path: Path) -> str | None:
    """Key into READERS: the suffix before the compression suffix, if there is one."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    packed = len(suffixes) == 2 and suffixes[-1] in OPENERS
    kind = suffixes[0] if packed else suffixes[-1] if suffixes else ""
    return kind if kind in READERS and not (packed and kind == ".parquet") else None


def read(path: Path, text_key: str, own: Mapping[str, OwnReader] = NONE) -> Iterator[Document | Defect]:
    """Every document of a file, in order. If the rest of a file is unreadable, the last item is a single Defect."""
    line = 0
    try:
        mine = own_reader(path, own, (*READERS, *OPENERS))
        items = READERS[present(_kind(path))](path, text_key) if mine is None else _own(mine, path, text_key)
        for item in items:
            line = item.line
            if isinstance(item, Document):
                item = _checked(item, text_key)
            yield item
    except FailedReader as error:
        yield Defect(str(path), line + 1, "the extension's reader failed", str(error))
    except DamagedArchive as error:
        yield Defect(str(path), line + 1, "truncated or damaged archive", str(error))
    except OSError as error:
        yield Defect(str(path), line + 1, "unreadable file", error.strerror or str(error))


def _checked(document: Document, text_key: str) -> Document | Defect:
    if not isinstance(document.text, str):
        kind, row = type(document.text).__name__, {text_key: document.text}
        return Defect(document.file, document.line, "text is not a string", kind, row=row)
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
    """One JSON object per line, with the text under `text_key` (`a.b` is b of a). Blank lines are skipped."""
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
                item = parsed_object(data)
                if isinstance(item, dict):
                    yield _document(item, text_key, file, number, raw.tell())
                else:
                    yield Defect(file, number, *item)


def _json(path: Path, text_key: str) -> Iterator[Document | Defect]:
    """The objects of one list; or, as many corpora under this name are, one JSON object per line."""
    with open_bytes(path) as (content, raw):
        beginning = content.read(1 << 12)
    if not beginning.lstrip(BLANK).startswith(b"["):
        yield from _lines(path, text_key)
        return
    file = str(path)
    with open_bytes(path) as (content, raw):
        for line, item in listed_objects(content, MAX_BYTES):
            if isinstance(item, dict):
                yield _document(item, text_key, file, line, raw.tell())
            else:
                yield Defect(file, line, *item)


def _own(reader: OwnReader, path: Path, text_key: str) -> Iterator[Document | Defect]:
    for number, row in rows_of(reader, path):
        yield _document(row, text_key, str(path), number, 0)


def _document(row: Mapping[str, Any], text_key: str, file: str, line: int, position: int) -> Document | Defect:
    """The text under `text_key` of a row."""
    text = value_at(row, text_key)
    if text is not MISSING:
        return Document(text, file, line, position)
    detail, fix = f"{text_key!r}; there are {sorted(row)[:8]}", f"name it with --text-key {likely_text_key(row)}"
    return Defect(file, line, "missing key", detail, fix, row)


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
            number, total, names = 0, max(1, table.metadata.num_rows), table.schema_arrow.names
            if twins := sorted({name for name in names if names.count(name) > 1}):
                yield Defect(file, 1, "two columns of one name", twins[0], "rename one of them")
                return
            columns = [name for name in names if name == text_key or text_key.startswith(f"{name}.")]
            if not columns:  # as of its first row, with all columns
                first: dict[str, Any] = next(
                    (row for batch in table.iter_batches(batch_size=1) for row in batch.to_pylist()), {}
                )
                yield _document(first or dict.fromkeys(names), text_key, file, 1, 0)
                return
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        row = {name: batch.column(name)[i].as_py() for name in columns}
                        yield _document(row, text_key, file, number, size * number // total)
                    except UnicodeDecodeError as error:
                        yield Defect(file, number, "bad UTF-8", f"at byte {error.start}")
    except pyarrow.ArrowException as error:
        raise DamagedArchive(str(error).splitlines()[0]) from error


READERS: dict[str, Callable[[Path, str], Iterator[Document | Defect]]] = {
    ".txt": _text,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _rows,
}
"""Reader for each file suffix."""
