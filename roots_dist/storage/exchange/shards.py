"""Tensors into files of bounded size, as they come: never more than one file's in memory."""

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
from roots_dist.storage.checkpoint.format import plan_shards, sync
from roots_dist.storage.exchange.tensors import refused

Write = Callable[[int, int, dict[str, Tensor]], None]
"""(number of the file, counted from 1, how many there are, its tensors)"""


def write_shards(tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], limit: int, write: Write) -> None:
    """sizes: bytes of each tensor, in the order in which they come."""
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
        )  # a view would keep its whole tensor in memory
    write(number + 1, plan.num_shards, filled)


def bytes_of(shape: Iterable[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def refuse_content(folder: Path) -> None:
    """Raises ExchangeError unless the folder is new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise refused("folder", str(folder), "a new folder, or an empty one", "choose another name, or remove it")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` by one rename when all is there, and vanishes if anything goes wrong.

    Raises ExchangeError if `final` has content.
    """
    refuse_content(final)
    final = Path(os.path.abspath(final))
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        partial.mkdir()
        yield partial
        sync(partial)
        os.rename(partial, final)
        sync(final.parent)
    except OSError as error:
        raise ExchangeError(
            f"cannot write {final}: {error}. Fix: make room there, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
