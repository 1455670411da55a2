"""Ten operations on a disk, or on an object store, that checkpoints are made of. Those that change a disk go through
`os` alone, so that a test can stop or forget any.

    make_folder, write_file, rename, remove, sync_folder | size_of, hash_file, read, names, is_there

What is promised to be on disk is: a file when write_file returns, a name when sync_folder of its folder does. In an
object store (object_store.py) a file is there with its name when write_file returns.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from roots_dist.files import open_plain, read_plain
from roots_dist.storage.checkpoint.answers import ask
from roots_dist.storage.checkpoint.object_store import ObjectPath, Place

BLOCK = 1 << 22


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of a file."""

    bytes: int
    sha256: str


def make_folder(path: Place) -> None:
    """Make a folder in one that exists, and wait until its name is on disk. Nothing happens if it is there; a link to a
    folder is refused with an OSError. An object store has no folders."""
    if isinstance(path, ObjectPath):
        return
    try:
        os.mkdir(path)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(20, "expected a folder, and neither a file nor a link", str(path)) from None
    sync_folder(path.parent)


def write_file(path: Place, parts: Iterable[bytes | memoryview]) -> FileFacts:
    """Write a new file and wait until it is on disk. Returns what was in memory: a bit that flips on the way to the
    disk makes a file that differs from its hash."""
    if isinstance(path, ObjectPath):
        with path.writing() as file:
            return _write(parts, file.write)
    fd = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        facts = _write(parts, lambda block: _write_all(fd, block))
        os.fsync(fd)
    finally:
        os.close(fd)
    return facts


def _write(parts: Iterable[bytes | memoryview], write: Callable[[memoryview], object]) -> FileFacts:
    sha, size = hashlib.sha256(), 0
    for part in parts:
        for first in range(0, len(part), BLOCK):
            block = memoryview(part)[first : first + BLOCK]
            sha.update(block)
            size += len(block)
            write(block)
    return FileFacts(size, sha.hexdigest())


def _write_all(fd: int, block: memoryview) -> None:
    while block:
        block = block[os.write(fd, block) :]


def read(path: Place) -> bytes:
    """Content of a file. Raises OSError if it is not there, or a pipe or a device; EnvironmentProblem if its disk or
    its store does not answer, as all that ask do."""
    return path.read() if isinstance(path, ObjectPath) else ask(path, lambda: read_plain(path))


def size_of(path: Place) -> int | None:
    """Bytes of a file; None if there is no such file."""
    if isinstance(path, ObjectPath):
        return path.size() if path.is_file() else None
    found = _status(path)
    return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None


def names(folder: Place) -> list[str]:
    """Names of the entries of a folder, sorted: those that begin with a dot come first. Empty if it is no folder."""
    if isinstance(folder, ObjectPath):
        return sorted(path.name for path in folder.iterdir())
    found = _status(folder)
    return sorted(ask(folder, lambda: os.listdir(folder))) if found is not None and stat.S_ISDIR(found.st_mode) else []


def is_there(path: Place) -> bool:
    """True if something has this name, even a link to nothing."""
    return path.exists() if isinstance(path, ObjectPath) else _status(path, follow=False) is not None


def _status(path: Path, follow: bool = True) -> os.stat_result | None:
    """The status of a name on disk; None if there is nothing."""
    try:
        return ask(path, lambda: os.stat(path, follow_symlinks=follow))
    except OSError:
        return None


def hash_file(path: Place) -> FileFacts:
    """Size and hash of a file as it is read."""

    def hashed() -> FileFacts:
        sha, size = hashlib.sha256(), 0
        with path.reading() if isinstance(path, ObjectPath) else open(path, "rb") as file:
            while block := file.read(BLOCK):
                sha.update(block)
                size += len(block)
        return FileFacts(size, sha.hexdigest())

    return ask(path, hashed)


def rename(old: Place, new: Place) -> None:
    """Give a file or folder another name in the same folder: at once on a disk, in an object store by copies, the
    manifest last."""
    if isinstance(old, ObjectPath):
        assert isinstance(new, ObjectPath), (old, new)
        old.rename(new)
    else:
        os.rename(old, str(new))


def sync_folder(path: Place) -> None:
    """Wait until the names in a folder are on disk. Some file systems of networks and of user space cannot be asked for
    that (EINVAL)."""
    if isinstance(path, ObjectPath):
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def remove(path: Place) -> None:
    """Remove a file, a link, or a folder with all that is in it. Links are removed, not followed. Nothing happens if
    there is none."""
    if isinstance(path, ObjectPath):
        path.remove()
        return
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        for name in os.listdir(path):
            remove(path / name)
        os.rmdir(path)
    except FileNotFoundError:
        return
