"""A lock on a run's folder that the kernel releases however its holder ends. Works on Linux and macOS; on shared file
systems only as far as they support locks."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roots_dist.errors import Problem, UserError
from roots_dist.files import open_plain, printable

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class FolderError(UserError):
    """Another run uses the folder, or it cannot be written."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Lock the folder, and yield the descriptor of the lock's file. Raises FolderError if another process holds the
    lock."""
    with os.fdopen(
        open_plain(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT), "r+", encoding="utf-8", errors="replace"
    ) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a subclass of OSError, so it comes first
            holder = printable(lock.readline(200).strip()) or "another run"
            problem = Problem(
                key="track.folder",
                found=str(folder),
                expected=f"a folder that no other run writes into ({holder} does)",
                fix="wait for that run or stop it, or choose another track.folder",
            )
            raise FolderError(problem) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure that no other run writes into it", folder, error)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield lock.fileno()


def holder_of(folder: Path) -> tuple[str, bool | None]:
    """The line of the last process that locked the folder (empty if there is none), and whether it holds the lock now;
    None if that cannot be known: the lock cannot be read, or the file system has no locks."""
    line = ""
    try:
        with open(folder / LOCK_FILE, encoding="utf-8", errors="replace") as lock:
            line = lock.readline(200)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass
    except BlockingIOError:  # a subclass of OSError, so it comes first
        return line, True
    except OSError:
        return line, None
    return line, False
