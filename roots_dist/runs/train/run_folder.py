"""Exclusive use of a run's folder: a lock (storage/checkpoint/folder_lock.py), and an error when the disk is full.

Held by runs/train/loop.py on rank 0 before anything in the folder is touched.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from roots_dist.config.extensions import COPIES
from roots_dist.errors import EnvironmentProblem, Problem
from roots_dist.failures import ERRORS
from roots_dist.files import PARTIAL
from roots_dist.runs.track.tensorboard import FOLDER as TENSORBOARD
from roots_dist.storage.checkpoint.folder_lock import FolderError, lock_folder

FOLDERS = (ERRORS, COPIES, TENSORBOARD, "wandb")
"""Folders in a run's folder into which this package or a tracker writes, besides checkpoints."""
LITTER = re.compile(rf"\..+\.\d+(-\d+)?{re.escape(PARTIAL)}")
OLD_S = 600.0
"""Seconds after which nobody writes a file any more that was begun: other ranks may be about to say why they end."""
FULL = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM)
ODD = (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@dataclass(frozen=True)
class HeldFolder:
    """A folder that this process holds."""

    path: Path
    fd: int
    """Descriptor of the folder itself, which stays that of the folder when it is renamed or removed."""

    def is_there(self) -> bool:
        """True if the folder still has its name. A disk that does not answer is no reason to think otherwise."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False
        except OSError:
            return True


@contextmanager
def hold_folder(folder: Path) -> Iterator[HeldFolder]:
    """Hold the run's folder, which is created if needed. Raises FolderError if another process holds it, or if its
    disk fails while the body runs; EnvironmentProblem if another file cannot be read or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with lock_folder(folder):
                _refuse_links(folder)
                _remove_litter(folder)
                yield HeldFolder(folder, fd)
        finally:
            os.close(fd)
    except OSError as error:
        if not _is_below(folder, error):
            raise EnvironmentProblem(
                f"{error.filename}: {error.strerror}. Fix: see to it, and repeat the command"
            ) from error
        if error.errno in (*FULL, *BROKEN):
            wanted = "with free space for the run's files" if error.errno in FULL else "that takes the run's files"
            expected = f"a disk {wanted} ({error})"
            fix = "see to the disk and repeat the command: the run resumes from its newest checkpoint"
        elif error.errno in CLOSED:
            expected = f"files that this user may read and write ({error})"
            fix = "see to their owner and permissions, or choose another track.folder"
        elif error.errno in ODD:
            expected = f"plain files and folders under the names of a run, and no links ({error})"
            fix = "remove what is there, or choose another track.folder"
        else:
            raise
        raise FolderError(Problem(key="track.folder", found=str(folder), expected=expected, fix=fix)) from error


def _refuse_links(folder: Path) -> None:
    """Raise OSError if a folder that the run writes into is none of its own: whoever has made the link could lead the
    run elsewhere."""
    for path in (folder / name for name in FOLDERS):
        if path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "expected a folder, and no link", str(path))


def _remove_litter(folder: Path) -> None:
    """Remove what killed processes had begun to write: a metrics file that was rewritten may be large."""
    for path in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            if LITTER.fullmatch(path.name) and time.time() - path.lstat().st_mtime > OLD_S:
                path.unlink()


def _is_below(folder: Path, error: OSError) -> bool:
    """True if an error is one of the run's own files: those of a corpus, say, lie elsewhere. An error without a file
    name counts as one."""
    return (
        not isinstance(error.filename, (str, bytes))
        or folder.absolute() in (Path(os.fsdecode(error.filename)).absolute() / "x").parents
    )


def folder_gone(folder: Path, saved: str) -> FolderError:
    """The error of a run whose folder has vanished while it trained."""
    return FolderError(
        Problem(
            key="track.folder",
            found=str(folder),
            expected=f"the folder that the run began in, which has been removed or renamed; {saved}",
            fix="rename it back and repeat the command",
        )
    )
