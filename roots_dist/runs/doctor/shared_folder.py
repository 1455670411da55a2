"""The folder that all hosts share: every rank writes a file, renames it, and every host looks for all of them.

    write, on every rank --> look, on the first rank of each host --> findings: read-only, or not the same folder

Tried by doing it: permission bits do not tell of read-only mounts, full disks and quotas, and every host has some
/scratch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from roots_dist.cluster_profile import Finding, FolderAccess, format_ranks
from roots_dist.files import why

BYTES = 4 * 2**20
"""That each rank writes."""
PATIENCE_S = 3.0
"""Network file systems remember for a while what was not there."""


def place(given: Path | None, run_folder: Path | None) -> Path | None:
    """Which folder is tried: the one that was asked for, else where the run's folder is or is going to be."""
    if given is not None or run_folder is None:
        return given
    while not run_folder.exists() and run_folder != run_folder.parent:
        run_folder = run_folder.parent
    return run_folder


def write(folder: Path, token: str, rank: int) -> FolderAccess:
    """Write, flush to the disk, rename. `token` is of this examination, the same on all ranks."""
    mine = _file(folder, token, rank)
    try:
        if not folder.is_dir():
            raise OSError("it is a file" if folder.exists() else "there is no such folder")
        mine.parent.mkdir(exist_ok=True)
        start = time.perf_counter()
        with mine.with_suffix(".partial").open("wb") as file:
            file.write(token.encode().ljust(BYTES, b"\0"))
            file.flush()
            os.fsync(file.fileno())
        mine.with_suffix(".partial").replace(mine)
        took = time.perf_counter() - start
        return FolderAccess(rank=rank, trouble=None, bytes_per_s=BYTES / took, free=shutil.disk_usage(folder).free)
    except OSError as error:
        return FolderAccess(rank=rank, trouble=why(error), bytes_per_s=None, free=None)


def find_unseen(folder: Path, token: str, writers: Sequence[int]) -> list[int]:
    """The ranks whose files are not seen from here."""
    unseen, end = list(writers), time.monotonic() + PATIENCE_S
    while True:
        unseen = [rank for rank in unseen if not _is_there(_file(folder, token, rank), token)]
        if not unseen or time.monotonic() > end:
            return unseen
        time.sleep(0.05)


def remove_file(folder: Path, token: str, rank: int) -> None:
    """Take this rank's files away; the last one takes the folder too."""
    mine = _file(folder, token, rank)
    with suppress(OSError):
        mine.with_suffix(".partial").unlink(missing_ok=True)
        mine.unlink(missing_ok=True)
        mine.parent.rmdir()


def findings(
    folder: Path,
    wrote: Sequence[FolderAccess],
    unseen: Mapping[int, Sequence[int]],
    hosts: Mapping[int, str],
    checkpoint: int | None,
) -> Iterator[Finding]:
    """`unseen`: by the rank that looked. `checkpoint`: bytes of one of the config's, if there is a config."""
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
            fix="mount it writable on that host, or name another folder (--folder, track.folder)",
        )
    for looked, missing in unseen.items():
        if missing:
            yield Finding(
                check="folder",
                where=f"host {hosts[looked]}",
                found=f"does not see in {folder} what {format_ranks(missing, hosts)} wrote there",
                expected="one folder shared by all hosts",
                fix="mount the same file system there on every host, or name a folder that is shared",
            )
    free = min((one.free for one in wrote if one.free is not None), default=None)
    if checkpoint is not None and free is not None and free < checkpoint:
        yield Finding(
            check="folder",
            where=f"folder {folder}",
            found=f"{free / 2**30:.1f} GiB free",
            expected=f"room for one checkpoint of {checkpoint / 2**30:.1f} GiB",
            fix="make room there, or name another track.folder",
        )


def _file(folder: Path, token: str, rank: int) -> Path:
    return folder / f".roots-doctor-{token}" / f"rank_{rank:05d}"


def _is_there(path: Path, token: str) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(token)) == token.encode()
    except OSError:
        return False
