"""An object store as a place for checkpoints, through fsspec: what disk.py asks of a disk, of keys instead of files.

    checkpoint.url = s3://bucket/runs/mine --place_of--> ObjectPath: read, write, list, copy, remove | disk.py

An object is there whole when its write has ended, or not at all; there is no rename, and nothing is synced. So a
checkpoint is written under its own name and becomes one with its manifest, which comes last; before that an object
UNFINISHED tells it from one that has lost its manifest. To rename copies, the manifest last.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from roots_dist.errors import missing_package

MANIFEST = "manifest.json"
"""File of a checkpoint that lists the others, and makes a folder a checkpoint."""
UNFINISHED = "unfinished"
"""Object that stands in a checkpoint from the first byte until its manifest is there, and while it is deleted."""


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A key, or what begins with it as if it were a folder: the methods of pathlib.Path that checkpoints use. Raises
    OSError where a store does not answer, whatever its library raises."""

    protocol: str
    key: str

    def __str__(self) -> str:
        return f"{self.protocol}://{self.key}"

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.protocol, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.protocol, str(PurePosixPath(self.key).parent))

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def exists(self) -> bool:
        with self._store() as store:
            return bool(store.exists(str(self)))

    def is_dir(self) -> bool:
        with self._store() as store:
            return bool(store.isdir(str(self)))

    def is_file(self) -> bool:
        with self._store() as store:
            return bool(store.isfile(str(self)))

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[ObjectPath]:
        try:
            with self._store() as store:
                found = [PurePosixPath(name).name for name in store.ls(str(self), detail=False)]
        except FileNotFoundError:
            return
        yield from (self / name for name in found if name and name != self.name)

    def size(self) -> int:
        with self._store() as store:
            return int(store.info(str(self))["size"])

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes from `start` to before `end`."""
        with self._store() as store:
            return bytes(store.cat_file(str(self), start=start, end=end))

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """A binary file, which is read in blocks."""
        with self._store() as store, store.open(str(self), "rb") as file:
            yield file

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """A binary file that is there when the block ends without an error, and otherwise not at all."""
        with self._store() as store:
            file = store.open(str(self), "wb", autocommit=False)
            try:
                yield file
                file.close()
                file.commit()
            except BaseException:
                file.discard()
                raise

    def rename(self, new: ObjectPath) -> None:
        """Copy what is under this name, the manifest last, and remove it here."""
        with self._store() as store:
            for key in sorted(self._keys(store), key=lambda key: key.endswith(f"/{MANIFEST}")):
                store.cp_file(key, f"{new}{key.removeprefix(str(self))}")
        self.remove()

    def remove(self) -> None:
        """Remove what is under this name: the manifest first, and last what says that it is no checkpoint."""
        with self._store() as store:
            keys = self._keys(store)
            for key in sorted(keys, key=lambda key: (not key.endswith(f"/{MANIFEST}"), key.endswith(f"/{UNFINISHED}"))):
                store.rm_file(key)

    def _keys(self, store: Any) -> list[str]:
        """All keys under this one, as URLs."""
        prefix = f"{self.protocol}://"
        return [prefix + str(key).removeprefix(prefix).lstrip("/") for key in store.find(str(self))]

    @contextmanager
    def _store(self) -> Iterator[Any]:
        """fsspec's file system. It keeps no list of what is there: other ranks and runs write too."""
        try:
            import fsspec  # type: ignore[import-untyped]
        except ImportError:
            raise missing_package("fsspec", "s3") from None
        try:
            yield fsspec.filesystem(self.protocol, use_listings_cache=False)
        except OSError:
            raise
        except ImportError as error:
            raise missing_package(f"{self.protocol}:// ({error})", "s3") from None
        except Exception as error:  # of a store's own library: no credentials, no such host
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(self)) from error


Place = Path | ObjectPath
"""Where checkpoints are."""


def is_url(text: str) -> bool:
    return "://" in text


def place_of(text: str) -> Place:
    """The folder, or the place in an object store, that a config names."""
    if not is_url(text):
        return Path(text)
    protocol, _, key = text.partition("://")
    return ObjectPath(protocol, key.strip("/"))
