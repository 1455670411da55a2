"""A file that lines are appended to. A line that cannot be written (a full disk) is kept and tried again with the next
one: a measurement is not worth a training run."""

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
        self._fd = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, line: str) -> None:
        if len(self._kept) < MOST:
            self._kept += line.encode()
        else:
            self._lost += 1
        try:
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
