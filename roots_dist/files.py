"""Write a file whole or not at all, and say why one could not be read or written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from roots_dist.errors import Problem, UserError

WORKING_DIRECTORY = "the working directory"
PARTIAL = ".partial"
"""Suffix of a file or folder that is being written."""
MOST_BYTES = 1 << 30
"""Bytes of a file that is read whole: the index of a million tensors has a tenth of them, and a sparse file of a
terabyte costs nobody anything to leave in a folder."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) under `path`, or leave what was there. Raises OSError. The folder must exist.

    A reader sees the old file or the new one, never a part; a process that is killed leaves a hidden
    `.partial` file.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_output(option: str, path: Path, content: str, fix: str = "name another file") -> None:
    """Put `content` under the path that an option names, in a folder that is made if needed. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        expected = f"a file that can be written ({why_not_written(error)})"
        raise UserError(Problem(key=option, found=str(path), expected=expected, fix=fix)) from None


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an error, and is removed otherwise.

    A link under that name is replaced, never followed."""
    writer = f"{os.getpid()}-{threading.get_native_id()}"  # several ranks, and threads of one, may write one file
    partial = path.with_name(f".{path.name}.{writer}{PARTIAL}")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()  # of a killed process that had this number, or a link that waits for us
    try:
        with os.fdopen(open_plain(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def open_plain(path: Path, flags: int, folder: int | None = None) -> int:
    """Open a file of a run's folder to write it, and return its descriptor. Raises OSError if it is a link, a pipe or
    a device: whoever may write into that folder could lead the run elsewhere, or let it wait.

    `folder`: descriptor of the folder that holds the file, if it may have been renamed. Its permissions are what the
    umask leaves of 0666."""
    name = path if folder is None else path.name
    with _named(path):
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)
    return _plain(fd, path)


def open_lines(path: Path) -> IO[str]:
    """Open a file of text to read its lines. A pipe has none, and lets nobody wait. Raises OSError."""
    with _named(path):
        return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8", errors="replace")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an OSError name the file, which was opened by a number or in a folder."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def read_plain(path: Path) -> bytes:
    """Content of a file, also through a link. Raises OSError if it is a pipe or a device, which could block or never
    end, or has more than MOST_BYTES, which could fill the memory."""
    with os.fdopen(_plain(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), path), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
            raise OSError(errno.EFBIG, f"{size} bytes are more than any file of its kind has", str(path))
        return file.read()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if it cannot be read. For what only adds to something: never raises."""
    try:
        found = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(fd: int, path: Path) -> int:
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a plain file", str(path))


def printable(text: str) -> str:
    """The text as it can be shown on a line: with escapes where it has control characters or bytes that are no
    text."""
    return text if text.isprintable() else ascii(text)


def why(error: Exception) -> str:
    """The reason of an OSError or a UnicodeDecodeError in lower case, as a part of a sentence: `permission denied`."""
    if isinstance(error, UnicodeError):
        return "not UTF-8 text"
    return str((error.strerror if isinstance(error, OSError) else None) or error or "unknown error").lower()


def why_not_written(error: OSError) -> str:
    """The same of a new file whose folder is there: that one is not missing."""
    return "it cannot be made there" if isinstance(error, FileNotFoundError) else why(error)


def where(path: str | Path) -> str:
    """The path as a part of a sentence that says where it was looked for: `data/x.idx in /home/me, the working
    directory`."""
    is_whole = Path(path).is_absolute() or "://" in str(path)
    return str(path) if is_whole else f"{path} in {Path.cwd()}, {WORKING_DIRECTORY}"


def reason(error: Exception, path: str | Path) -> str:
    """The reason why a file cannot be used: the operating system's, with the place where it was looked for, or the
    reader's words."""
    return f"{why(error)}: {where(path)}" if isinstance(error, OSError) else str(error)
