"""Slices of tensors in a safetensors file of an object store: only the rows that are asked for are fetched.

open_tensors(place) --safetensors.safe_open | ObjectTensors--> get_slice(name)[rows, columns]
"""

from __future__ import annotations

import errno
import json
import math
import struct
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from roots_dist.storage.checkpoint.answers import ask
from roots_dist.storage.checkpoint.object_store import ObjectPath, Place

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def open_tensors(place: Place) -> Any:
    """A safetensors file, opened for `get_slice`. Raises OSError or SafetensorError, and EnvironmentProblem if the disk
    or the store does not answer."""
    if isinstance(place, ObjectPath):
        return ObjectTensors(place)
    ask(place, lambda: place.open("rb").close())  # a disk that does not answer is known by a number; safe_open has none
    return safe_open(place, framework="pt")


class ObjectTensors:
    """The counterpart of safetensors' safe_open: size of the header, header, data
    (https://huggingface.co/docs/safetensors). Raises OSError if it is none."""

    def __init__(self, path: ObjectPath):
        self._path = path
        try:
            (length,) = struct.unpack("<Q", path.read(0, 8))
            self._begin = 8 + length
            if self._begin > path.size():
                raise ValueError(f"a header of {length} bytes")
            self._header: dict[str, Any] = json.loads(path.read(8, self._begin))
        except (struct.error, ValueError) as error:
            raise OSError(f"{path}: is no safetensors file ({error})") from error

    def get_slice(self, name: str) -> ObjectSlice:
        try:
            entry = self._header[name]
            first, end = entry["data_offsets"]
            found = ObjectSlice(self._path, DTYPES[entry["dtype"]], entry["dtype"], entry["shape"], self._begin + first)
        except (KeyError, TypeError, ValueError) as error:
            raise OSError(f"{self._path}: {name} cannot be read ({error!r})") from error
        if end - first != math.prod(entry["shape"]) * found.dtype.itemsize:
            raise OSError(f"{self._path}: {name}: {end - first} bytes are not those of its shape")
        return found


class ObjectSlice:
    """The counterpart of safetensors' slice of a tensor, with the methods that are used."""

    def __init__(self, path: ObjectPath, dtype: torch.dtype, name: str, shape: list[int], begin: int):
        self._path, self.dtype, self._name, self._shape, self._begin = path, dtype, name, shape, begin

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return self._name

    def __getitem__(self, wanted: slice | tuple[slice, ...]) -> Tensor:
        """The wanted part. Whole rows are fetched, and columns cut from them."""
        slices = wanted if isinstance(wanted, tuple) else (wanted,)
        if not self._shape:
            return self._fetch(0, 1).reshape(())[...]
        rows, *others = slices
        first, end, _ = rows.indices(self._shape[0])
        size = math.prod(self._shape[1:])
        whole = self._fetch(first * size, max(end, first) * size)
        return whole.reshape(-1, *self._shape[1:])[(slice(None), *others)].contiguous()

    def _fetch(self, first: int, end: int) -> Tensor:
        """Numbers of the flat tensor."""
        if first == end:
            return torch.empty(0, dtype=self.dtype)
        size = self.dtype.itemsize
        begin, wanted = self._begin + first * size, (end - first) * size

        def fetched() -> bytes:
            found = self._path.read(begin, begin + wanted)
            if len(found) != wanted:  # a proxy, or a connection that broke: the size was compared before
                raise OSError(errno.EIO, f"{len(found)} bytes, {wanted} were asked for")
            return found

        return torch.frombuffer(bytearray(ask(self._path, fetched)), dtype=self.dtype)
