"""A file that lines are appended to. A line that cannot be written (a full disk) is kept and tried again with the next
one: a measurement is not worth a training run. A file that was removed or renamed meanwhile is begun anew, and that is
said: lines that go into a file without a name are lost in silence."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from roots_dist.files import open_plain, why

log = logging.getLogger(__name__)

MOST = 1 << 26
"""Bytes that are kept while they cannot be written; later lines are lost."""


class LineFile:
    """Raises OSError if the file cannot be opened, later only warns. A line is handed to the operating system when
    `write` returns, unless it has warned."""

    def __init__(self, path: Path):
        self._path, self._kept, self._lost = path, b"", 0
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._fd = self._open()

    def _open(self) -> int:
        return open_plain(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._folder)

    def _open_again_if_gone(self) -> None:
        """Begin a new file where the name leads to another one, or to none; not where the whole folder has been
        removed: that ends the run."""
        try:
            found = os.stat(self._path.name, dir_fd=self._folder, follow_symlinks=False)
            is_gone = not os.path.samestat(found, os.fstat(self._fd))
        except FileNotFoundError:
            is_gone = os.fstat(self._folder).st_nlink > 0
        if is_gone:
            fd, before = self._open(), self._fd
            self._fd = fd
            os.close(before)
            log.warning("%s was removed or renamed: its next lines are in a new file", self._path)

    def write(self, line: str) -> None:
        if len(self._kept) < MOST:
            self._kept += line.encode()
        else:
            self._lost += 1
        try:
            self._open_again_if_gone()
            self._flush()
        except OSError as error:
            lost = f"; {self._lost} later lines are lost" if self._lost else ""
            log.warning(
                "%s cannot be written (%s): its last %d lines are kept in memory and tried again with the next%s",
                self._path, why(error), self._kept.count(b"\n"), lost,
            )  # fmt: skip

    def _flush(self) -> None:
        while self._kept:
            written = os.write(self._fd, self._kept)
            self._kept = self._kept[written:]

    def close(self) -> None:
        try:
            self._flush()
        except OSError as error:
            log.warning("%s lacks its last %d lines (%s)", self._path, self._kept.count(b"\n"), why(error))
        os.close(self._fd)
        os.close(self._folder)
