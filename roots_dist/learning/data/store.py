"""The corpus on disk: Megatron's `.bin` / `.idx` pair, written as a stream and read through memory maps.

    token ids of documents --Writer--> prefix.bin, prefix.idx --Corpus.open--> tokens(start, length) for objectives

prefix.bin contains raw ids back to back. prefix.idx, little endian: magic, version, token type, the number N of
sequences, the length M of the document index, then int32[N] lengths, int64[N] byte offsets, int64[M] document index (0,
then cumulative numbers of sequences; M = documents + 1), and in multimodal files int8[N] modes, which are ignored.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from roots_dist.errors import DataError, Problem
from roots_dist.files import PARTIAL
from roots_dist.idx_format import HEADER, MAGIC, OTHER_TABLES, TOKEN_TYPES, IdxError, read_header

LONGEST_SEQUENCE = 2**31 - 1


def token_type(vocab: int) -> np.dtype:
    """The dtype that Megatron uses for a vocabulary."""
    return np.dtype("<u2" if vocab < 65_500 else "<i4")


class Writer:
    """Writes the pair under temporary names; `commit` moves both into place when they are complete.

    Leaving the `with` block without `commit` deletes what was written. A killed process leaves only temporary files,
    which the next writer of this prefix overwrites.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self._final = [Path(f"{prefix}{ending}") for ending in (".bin", ".idx")]
        self._temporary = [path.with_name(path.name + PARTIAL) for path in self._final]
        self._bin = self._temporary[0].open("wb")
        self._lengths, self._documents = array("i"), array("q", [0])

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def add(self, document: np.ndarray, sequences: Sequence[int] | None = None) -> None:
        """Append a document. sequences: lengths of its parts, in order; by default it is one sequence."""
        assert sequences is None or sum(sequences) == len(document), (sequences, len(document))
        if len(document) > LONGEST_SEQUENCE:
            raise DataError(
                Problem(
                    key="document",
                    found=f"{len(document):,} tokens",
                    expected=f"at most {LONGEST_SEQUENCE:,}",
                    fix="split it",
                )
            )
        self._bin.write(np.ascontiguousarray(document, dtype=self.dtype).data)
        self._lengths.extend(sequences or [len(document)])
        self._documents.append(len(self._lengths))

    def commit(self) -> None:
        """Write the index and give both files their final names."""
        lengths = np.asarray(self._lengths, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1].astype("<i8") * self.dtype.itemsize, out=offsets[1:])
        documents = np.asarray(self._documents, dtype="<i8")
        code = next(code for code, name in TOKEN_TYPES.items() if np.dtype(name) == self.dtype)
        with self._temporary[1].open("wb") as idx:
            idx.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(documents)))
            for part in (lengths, offsets, documents):
                idx.write(part.data)
            _fsync(idx)
        _fsync(self._bin)
        self._bin.close()
        for temporary, final in zip(self._temporary, self._final):  # .idx last: without it there is no corpus
            os.replace(temporary, final)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._bin.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)


def _fsync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus as one stream of tokens, in the order of the index. Reads only the tokens that are requested."""

    prefix: str
    lengths: np.ndarray
    offsets: np.ndarray
    """Byte offset of each sequence in the .bin file."""
    documents: np.ndarray
    """Number of sequences before each document, followed by their total."""
    stored: np.ndarray
    """Memory map of the .bin file."""

    @staticmethod
    def open(prefix: str | Path) -> Corpus:
        """Open a pair. Raises DataError if it is missing, damaged, or inconsistent with its header."""
        prefix = str(prefix)
        prefix = prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix
        index, stored = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, stored):
            if not path.is_file():
                raise DataError(
                    Problem(
                        key="corpus",
                        found=prefix,
                        expected=f"the files {prefix}.bin and .idx; {path.name} is missing",
                        fix=_nearby(prefix),
                    )
                )
        return _open(prefix, index, stored)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def _in_order(self) -> bool:
        """True if the sequences lie back to back in the .bin file, so that the stream is the file."""
        sizes = self.lengths[:-1] * np.int64(self.stored.itemsize)
        return bool(self.offsets[0] == 0 and (self.offsets[:-1] + sizes == self.offsets[1:]).all())

    @cached_property
    def _starts(self) -> np.ndarray:
        """Byte position of each sequence in the stream. For sequences in order these are the offsets, which need no
        memory."""
        if self._in_order:
            return self.offsets
        starts = np.zeros(len(self.lengths), dtype=np.int64)
        np.cumsum(self.lengths[:-1] * np.int64(self.stored.itemsize), out=starts[1:])
        return starts

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64: first token of each document in the stream, followed by the total number of tokens."""
        inside = self.documents[self.documents < len(self.lengths)]
        before = np.asarray(self._starts[inside]) // self.stored.itemsize
        return np.append(before, np.full(len(self.documents) - len(inside), self.num_tokens))

    def sequences_of(self, document: int) -> np.ndarray:
        """int64: first token of each sequence of a document in the stream."""
        mine = slice(int(self.documents[document]), int(self.documents[document + 1]))
        return np.asarray(self._starts[mine]) // self.stored.itemsize

    def tokens(self, start: int, length: int) -> np.ndarray:
        """A part of the stream, in the stored dtype."""
        assert start >= 0 and length >= 0 and start + length <= self.num_tokens, (start, length, self.num_tokens)
        if self._in_order:
            return self.stored[start : start + length]
        parts, sequence = [], self.sequence_at(start)
        while length:
            skip = start - int(self._starts[sequence]) // self.stored.itemsize
            part = self._sequence(sequence)[skip : skip + length]
            parts.append(part)
            start, length, sequence = start + len(part), length - len(part), sequence + 1
        return np.concatenate(parts) if parts else self.stored[:0]

    def document(self, i: int) -> np.ndarray:
        """All tokens of a document."""
        assert 0 <= i < self.num_documents, (i, self.num_documents)
        mine = range(int(self.documents[i]), int(self.documents[i + 1]))
        return np.concatenate([self.stored[:0], *map(self._sequence, mine)])

    def sequence_at(self, position: int) -> int:
        """Sequence that contains this token of the stream."""
        return int(np.searchsorted(self._starts, position * self.stored.itemsize, side="right")) - 1

    def document_at(self, position: int) -> int:
        """Document that contains this token of the stream."""
        return int(np.searchsorted(self.documents, self.sequence_at(position), side="right")) - 1

    def documents_of(self, start: int, length: int) -> np.ndarray:
        """int64: document of each token in a part of the stream."""
        first, last = self.document_at(start), self.document_at(start + length - 1)
        ends = self._starts[self.documents[first + 1 : last + 1]]
        return first + np.searchsorted(ends // self.stored.itemsize, np.arange(start, start + length), side="right")

    def _sequence(self, i: int) -> np.ndarray:
        start = int(self.offsets[i]) // self.stored.itemsize
        return self.stored[start : start + int(self.lengths[i])]


def num_windows(corpus: Corpus, stride: int, length: int) -> int:
    """Number of windows of `length` tokens in the stream, one every `stride` tokens. Raises DataError if there are
    none."""
    count = (corpus.num_tokens - length) // stride + 1
    if count < 1:
        raise DataError(
            Problem(
                key=f"tokens in {corpus.prefix}",
                found=corpus.num_tokens,
                expected=f"at least {length}, one sample",
                fix="a smaller data.seq_length, or more text",
            )
        )
    return count


def _open(prefix: str, index: Path, stored: Path) -> Corpus:
    def refuse(found: str, expected: str, fix: str) -> IdxError:
        return IdxError(prefix, found, expected, fix)

    header = read_header(prefix)
    dtype, num_sequences = np.dtype(header.token_type), header.num_sequences
    whole = np.memmap(index, dtype="u1", mode="r")
    tables = np.split(whole[HEADER.size : header.tables_end], [4 * num_sequences, 12 * num_sequences])
    lengths, offsets, documents = (table.view(kind) for table, kind in zip(tables, ("<i4", "<i8", "<i8")))
    if documents[0] != 0 or documents[-1] != num_sequences or (documents[1:] < documents[:-1]).any():
        raise refuse(
            "a document index that does not rise from 0 to the number of sequences",
            "one that does",
            "copy or write the .idx again",
        )
    found = stored.stat().st_size
    if lengths.min() < 0 or offsets.min() < 0 or offsets.max() > 2**62:  # above 2⁶² the next sum overflows
        raise refuse("a sequence with a length or offset that cannot be", "0 or more", "copy or write the .idx again")
    end = int((offsets + lengths * np.int64(dtype.itemsize)).max())
    if found != end:
        raise refuse(
            f"the .bin has {found:,} bytes",
            f"{end:,} by the .idx (token type {dtype.name})",
            f"copy the truncated or mixed-up file again; or its writer has another type table: {OTHER_TABLES}",
        )
    if (offsets % dtype.itemsize).any():
        raise refuse(
            f"an offset that is no multiple of {dtype.itemsize}",
            f"whole tokens of type {dtype.name}",
            f"rewrite it; {OTHER_TABLES}",
        )
    if found == 0:
        raise refuse("no tokens", "at least one", "prepare it from inputs with text")
    return Corpus(prefix, lengths, offsets, documents, np.memmap(stored, dtype=dtype, mode="r"))


def _nearby(prefix: str) -> str:
    """Suggest what the user may have meant: corpora in the same folder, or in the folder that was named."""
    folder = Path(prefix) if Path(prefix).is_dir() else Path(prefix).parent
    nearby = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    return f"choose one of {nearby[:5]}" if nearby else "create one with `roots prepare`"
