"""Write tensors to files of bounded size as they arrive, with at most one file's tensors in memory."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from roots_dist.errors import ExchangeError
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
        raise exchange_error(
            "folder", str(folder), "a new folder, or an empty one", "choose another name, or remove it"
        )


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder that becomes `final` by one rename at the end, and is removed on any error.

    Raises ExchangeError if `final` has content.
    """
    refuse_content(final)
    final = Path(os.path.abspath(final))
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
        yield partial
        sync_folder(partial)
        os.rename(partial, final)
        sync_folder(final.parent)
    except OSError as error:
        raise ExchangeError(
            f"cannot write {final}: {error}. Fix: free some space, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
