"""Exclusive use of a run's folder: a lock (storage/checkpoint/folder_lock.py), and an error when the disk is full.

Held by runs/train/loop.py on rank 0 before anything in the folder is touched.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roots_dist.errors import Problem
from roots_dist.storage.checkpoint.folder_lock import FolderError, lock_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
ODD = (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold the run's folder, which is created if needed. Raises FolderError if another process holds it, or if the disk
    fills up while the body runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            yield
    except OSError as error:
        if error.errno in FULL:
            expected = f"a disk with free space for the run's files ({error})"
            fix = "see to the disk and repeat the command: the run resumes from its newest checkpoint"
        elif error.errno in ODD:
            expected = f"plain files and folders under the names of a run, and no links ({error})"
            fix = "remove what is there, or choose another track.folder"
        else:
            raise
        raise FolderError(Problem(key="track.folder", found=str(folder), expected=expected, fix=fix)) from error
