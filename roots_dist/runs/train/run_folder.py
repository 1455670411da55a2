"""Exclusive use of a run's folder: a lock that the kernel releases however its holder ends, and an error when the disk
is full.

Held by runs/train/loop.py on rank 0 before anything in the folder is touched. Works on Linux and macOS; on shared file
systems only as far as they support locks.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roots_dist.errors import Problem, UserError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class FolderError(UserError):
    """Another run uses the folder, or it cannot be written."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold the run's folder, which is created if needed. Raises FolderError if another process holds it, or if the disk
    fills up while the body runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        problem = Problem(
            key="track.folder",
            found=str(folder),
            expected=f"enough free space for the run's files ({error})",
            fix="free some space and repeat the command: the run resumes from its newest checkpoint",
        )
        raise FolderError(problem) from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock the folder. Raises FolderError if another process holds the lock."""
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a subclass of OSError, so it comes first
            lock.seek(0)
            holder = lock.read().strip() or "another run"
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
        yield
