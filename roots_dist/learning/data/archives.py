"""Open a file with or without compression as a stream of bytes, and detect truncation in every format.

    path --open_bytes--> (bytes, raw file, whose position is the progress) --> learning/data/readers.py

A truncated archive is an error in every format, even where the library would silently return what it could read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from roots_dist.errors import missing_package

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj


class DamagedArchive(Exception):
    """The compressed data cannot be read to its end."""


class _Zstd(io.RawIOBase):
    """All frames of a .zst file. The library's own stream reader takes a truncated frame for the end of the file."""

    def __init__(self, raw: BufferedIOBase):
        try:
            import zstandard
        except ImportError as error:
            raise missing_package("zstandard", "formats") from error
        self._error = zstandard.ZstdError
        self._start: Callable[[], ZstdDecompressionObj] = lambda: zstandard.ZstdDecompressor(
            max_window_size=1 << 31
        ).decompressobj()
        self._frame: ZstdDecompressionObj | None = None
        self._raw, self._ready = raw, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """buffer: a memoryview, or whatever else Python lets bytes be written into."""
        while not self._ready:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._raw.read(1 << 17)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise DamagedArchive("compressed data ends in the middle of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._start()
            try:
                self._ready = self._frame.decompress(packed)
            except self._error as error:
                raise DamagedArchive(str(error)) from error
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


OPENERS: dict[str, Callable[[BufferedIOBase], BufferedIOBase]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw: bz2.BZ2File(raw),
    ".xz": lambda raw: lzma.LZMAFile(cast("BinaryIO", raw)),  # noqa: SIM115 # open_bytes closes it
    ".zst": lambda raw: io.BufferedReader(_Zstd(raw), 1 << 17),
}


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BufferedIOBase, BufferedIOBase]]:
    """Yield the decompressed content and the raw file. Any error of the decompressor becomes DamagedArchive."""
    with path.open("rb") as raw:
        opener = OPENERS.get(path.suffix.lower())
        if opener is None:
            yield raw, raw
            return
        if path.stat().st_size == 0:
            raise DamagedArchive("the file is empty, not an archive of nothing")
        try:
            with opener(raw) as content:
                yield content, raw
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise DamagedArchive(str(error)) from error
