"""Check of the folder that all hosts share: every rank writes and renames a file, and every host looks for all of them.

    write, on every rank --> find_unseen, on the first rank of each host --> findings: read-only, or not the same folder

The check writes, because permission bits do not show read-only mounts, full disks and quotas, and every host has some
/scratch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from roots_dist.accounting.memory import GIB
from roots_dist.cluster_profile import Finding, FolderAccess, format_ranks
from roots_dist.files import PARTIAL, why

BYTES = 4 * 2**20
"""Bytes that each rank writes."""
PATIENCE_S = 3.0
"""Seconds to wait for a file, because network file systems cache for a while that it was absent."""


def place(requested: Path | None, run_folder: Path | None) -> Path | None:
    """Folder to check: the requested one, else the run's folder or its nearest existing parent."""
    if requested is not None or run_folder is None:
        return requested
    while not run_folder.exists() and run_folder != run_folder.parent:
        run_folder = run_folder.parent
    return run_folder


def write(folder: Path, token: str, rank: int) -> FolderAccess:
    """Write a file, flush it to the disk, rename it. `token` identifies this examination and is equal on all ranks."""
    mine = _file(folder, token, rank)
    try:
        if not folder.is_dir():
            raise OSError("it is a file" if folder.exists() else "no such folder")
        mine.parent.mkdir(exist_ok=True)
        start = time.perf_counter()
        with mine.with_suffix(PARTIAL).open("wb") as file:
            file.write(token.encode().ljust(BYTES, b"\0"))
            file.flush()
            os.fsync(file.fileno())
        mine.with_suffix(PARTIAL).replace(mine)
        took = time.perf_counter() - start
        return FolderAccess(rank=rank, trouble=None, bytes_per_s=BYTES / took, free=shutil.disk_usage(folder).free)
    except OSError as error:
        return FolderAccess(rank=rank, trouble=why(error), bytes_per_s=None, free=None)


def find_unseen(folder: Path, token: str, writers: Sequence[int]) -> list[int]:
    """Ranks whose files are not seen from this host."""
    unseen, end = list(writers), time.monotonic() + PATIENCE_S
    while True:
        unseen = [rank for rank in unseen if not _has_token(_file(folder, token, rank), token)]
        if not unseen or time.monotonic() > end:
            return unseen
        time.sleep(0.05)


def remove_file(folder: Path, token: str, rank: int) -> None:
    """Remove this rank's files; the last rank removes the folder too."""
    mine = _file(folder, token, rank)
    with suppress(OSError):
        mine.with_suffix(PARTIAL).unlink(missing_ok=True)
        mine.unlink(missing_ok=True)
        mine.parent.rmdir()


def findings(
    folder: Path,
    wrote: Sequence[FolderAccess],
    unseen: Mapping[int, Sequence[int]],
    hosts: Mapping[int, str],
    checkpoint: int | None,
) -> Iterator[Finding]:
    """Findings from all answers. `unseen` is by the rank that looked; `checkpoint` is the bytes of a checkpoint, if
    there is a config."""
    troubles: dict[str, list[int]] = {}
    for one in wrote:
        if one.trouble is not None:
            troubles.setdefault(one.trouble, []).append(one.rank)
    for trouble, ranks in troubles.items():
        yield Finding(
            check="folder",
            where=format_ranks(ranks, hosts),
            found=f"cannot write to {folder} ({trouble})",
            expected="every rank to write and rename there",
            fix="mount it writable on that host, or choose another folder (--folder, track.folder)",
        )
    for looked, missing in unseen.items():
        if missing:
            yield Finding(
                check="folder",
                where=f"host {hosts[looked]}",
                found=f"does not see in {folder} what {format_ranks(missing, hosts)} wrote there",
                expected="one folder shared by all hosts",
                fix="mount the same file system there on every host, or choose a folder that is shared",
            )
    free = min((one.free for one in wrote if one.free is not None), default=None)
    if checkpoint is not None and free is not None and free < checkpoint:
        yield Finding(
            check="folder",
            where=f"folder {folder}",
            found=f"{free / GIB:.1f} GiB free",
            expected=f"space for one checkpoint of {checkpoint / GIB:.1f} GiB",
            fix="free some space there, or choose another track.folder",
        )


def _file(folder: Path, token: str, rank: int) -> Path:
    return folder / f".roots-doctor-{token}" / f"rank_{rank:05d}"


def _has_token(path: Path, token: str) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(token)) == token.encode()
    except OSError:
        return False
