"""Write tensors to files of bounded size as they arrive, with at most one file's tensors in memory."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from roots_dist.errors import ExchangeError
from roots_dist.files import PARTIAL
from roots_dist.storage.checkpoint.disk import sync_folder
from roots_dist.storage.checkpoint.format import plan_shards
from roots_dist.storage.exchange.tensors import exchange_error

Write = Callable[[int, int, dict[str, Tensor]], None]
"""Function of (number of the file, counted from 1; number of files; its tensors)."""


def write_shards(tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], limit: int, write: Write) -> None:
    """sizes: bytes of each tensor, in the order in which they arrive."""
    plan = plan_shards(list(sizes.values()), 1, limit)
    shard = dict(zip(sizes, plan.shard))
    filled: dict[str, Tensor] = {}
    number = 0
    for name, tensor in tensors:
        if shard[name] != number:
            write(number + 1, plan.num_shards, filled)
            filled, number = {}, shard[name]
        filled[name] = tensor.clone(
            memory_format=torch.contiguous_format
        )  # a view would keep its base tensor in memory
    write(number + 1, plan.num_shards, filled)


def bytes_of(shape: Iterable[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def refuse_content(folder: Path) -> None:
    """Raise ExchangeError unless the folder is new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise exchange_error("folder", str(folder), "a new folder, or an empty one", "choose another name")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder that becomes `final` by one rename at the end, when all that is in it is on disk, and is removed
    on any error.

    Raises ExchangeError if `final` has content, or another process is about to write it.
    """
    refuse_content(final)
    final = Path(os.path.abspath(final))
    partial = final.with_name(f".{final.name}{PARTIAL}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _held(partial, final):
            try:
                yield partial
                _sync(partial)
                os.rename(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync_folder(final.parent)
    except OSError as error:
        raise ExchangeError(
            f"cannot write {final}: {error}. Fix: free some space, or choose another folder."
        ) from error


@contextmanager
def _held(partial: Path, final: Path) -> Iterator[None]:
    """Make a folder, or empty the one that a killed process has left, and hold it meanwhile: two that write one would
    publish a mixture of both."""
    partial.mkdir(exist_ok=True)
    fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.path.samestat(os.stat(partial), os.fstat(fd))  # not published, or removed, just now
        except (BlockingIOError, FileNotFoundError):
            is_free = False
        except OSError:  # a file system without locks
            is_free = True
        if not is_free:
            fix = "wait until it has ended, or choose another name"
            raise exchange_error("folder", str(final), "a folder that no other process writes at this moment", fix)
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    """Wait until all that is in a folder is on disk: a name may be there before its bytes."""
    for path in folder.iterdir():
        if path.is_dir():
            _sync(path)
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_folder(folder)
