"""The folder of a run: one run's at a time (a lock that the kernel gives back however its holder ends), and with room.

Taken by runs/train/loop.py on rank 0 before anything in the folder is touched. Linux and macOS; on shared file systems
as far as those know locks.
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
    """Another run writes into the folder, or nobody can any more."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold the run's folder, which is made if need be. Raises FolderError if another process holds it, and in place of
    what the work inside raises when there is no room left."""
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
            expected=f"room for what the run writes ({error})",
            fix="make room there and repeat the command: it goes on from the newest checkpoint",
        )
        raise FolderError(problem) from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Raises FolderError if another process holds the folder."""
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # before OSError, of which it is one
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
            log.warning("%s cannot be locked (%s): see to it that no other run writes into it", folder, error)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
