"""Write a file whole or not at all, and say why one could not be read or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

WORKING_DIRECTORY = "the working directory"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) under `path`, or leave what was there. Raises OSError. The folder must exist.

    A reader sees the old file or the new one, never a part; a process that is killed leaves a hidden
    `.partial` file.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an error, and is removed otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several ranks may write one file
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def why(error: Exception) -> str:
    """The reason of an OSError or a UnicodeDecodeError in lower case, as a part of a sentence: `permission denied`."""
    if isinstance(error, UnicodeError):
        return "not UTF-8 text"
    return str((error.strerror if isinstance(error, OSError) else None) or error or "unknown error").lower()


def where(path: str | Path) -> str:
    """The path as a part of a sentence that says where it was looked for: `data/x.idx in /home/me, the working
    directory`."""
    return str(path) if Path(path).is_absolute() else f"{path} in {Path.cwd()}, {WORKING_DIRECTORY}"


def reason(error: Exception, path: str | Path) -> str:
    """Why a file cannot be used: the operating system's reason with where it was looked for, or the reader's words."""
    return f"{why(error)}: {where(path)}" if isinstance(error, OSError) else str(error)
