"""What a checkpoint asks of a disk: seven operations, each through `os` alone, so that a test can stop or forget any.

    make_folder, write_file, rename, remove, sync_folder | hash_file; files.py: read_plain

What is promised to be on disk is: a file when write_file returns, a name when sync_folder of its folder does.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from roots_dist.files import open_plain

BLOCK = 1 << 22


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of a file."""

    bytes: int
    sha256: str


def make_folder(path: Path) -> None:
    """Make a folder in one that exists, and wait until its name is on disk. Nothing happens if it is there; a link to a
    folder is refused with an OSError."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(20, "expected a folder, and neither a file nor a link", str(path)) from None
    sync_folder(path.parent)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileFacts:
    """Write a new file and wait until it is on disk. Returns what was in memory: a bit that flips on the way to the
    disk makes a file that differs from its hash."""
    sha, size = hashlib.sha256(), 0
    fd = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        for part in parts:
            for first in range(0, len(part), BLOCK):
                block = memoryview(part)[first : first + BLOCK]
                sha.update(block)
                size += len(block)
                while block:
                    block = block[os.write(fd, block) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileFacts(size, sha.hexdigest())


def hash_file(path: Path) -> FileFacts:
    """Size and hash of a file as it is read."""
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)
            size += len(block)
    return FileFacts(size, sha.hexdigest())


def rename(old: Path, new: Path) -> None:
    os.rename(old, new)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it. Links are removed, not followed. Nothing happens if
    there is none."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        for name in os.listdir(path):
            remove(path / name)
        os.rmdir(path)
    except FileNotFoundError:
        return
