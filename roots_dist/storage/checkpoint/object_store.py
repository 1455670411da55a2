"""An object store as a place for checkpoints, through fsspec: what disk.py asks of a disk, of keys instead of files.

    checkpoint.url = s3://bucket/runs/mine --place_of--> ObjectPath: read, write, list, copy, remove | disk.py

An object is there whole when its write has ended, or not at all; there is no rename, and nothing is synced. So a
checkpoint is written under its own name and becomes one with its manifest, which comes last; before that an object
UNFINISHED tells it from one that has lost its manifest. To rename copies, the manifest last.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from roots_dist.config.store_url import is_url
from roots_dist.errors import missing_package
from roots_dist.storage.checkpoint.answers import ask

T = TypeVar("T")

MANIFEST = "manifest.json"
"""File of a checkpoint that lists the others, and makes a folder a checkpoint."""
UNFINISHED = "unfinished"
"""Object that stands in a checkpoint from the first byte until its manifest is there, and while it is deleted."""


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A key, or what begins with it as if it were a folder: the methods of pathlib.Path that checkpoints use. Only
    what the store says not to exist is not there: where it does not answer, questions raise EnvironmentProblem, and
    what writes or is read in blocks raises OSError, whatever the store's library raises."""

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
        return self._type() != ""

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def is_file(self) -> bool:
        return self._type() == "file"

    def is_symlink(self) -> bool:
        return False

    def _type(self) -> str:
        """file, directory, or empty if there is nothing. fsspec's own questions take every error for a no."""
        try:
            return str(self._ask(lambda store: store.info(str(self))["type"]))
        except FileNotFoundError:
            return ""

    def iterdir(self) -> Iterator[ObjectPath]:
        found = [PurePosixPath(key).name for key, _ in self._listed()]
        yield from (self / name for name in found if name and name != self.name)

    def size(self) -> int:
        return int(self._ask(lambda store: store.info(str(self))["size"]))

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes from `start` to before `end`."""
        return bytes(self._ask(lambda store: store.cat_file(str(self), start=start, end=end)))

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
        for key in sorted(self._keys(), key=lambda key: key.endswith(f"/{MANIFEST}")):
            self._ask(methodcaller("cp_file", key, f"{new}{key.removeprefix(str(self))}"))
        self.remove()

    def remove(self) -> None:
        """Remove what is under this name: the manifest first, and last what says that it is no checkpoint."""

        def place(key: str) -> tuple[bool, bool]:
            return not key.endswith(f"/{MANIFEST}"), key.endswith(f"/{UNFINISHED}")

        for key in sorted(self._keys(), key=place):
            with suppress(FileNotFoundError):  # removed by a first attempt whose answer was lost
                self._ask(methodcaller("rm_file", key))

    def _keys(self) -> list[str]:
        """All keys under this one, as URLs."""
        found = []
        for key, kind in self._listed():
            inner = ObjectPath(self.protocol, key)
            found += inner._keys() if kind == "directory" and inner != self else [str(inner)]
        return found

    def _listed(self) -> list[tuple[str, str]]:
        """Key and type of what is directly under this one; of itself if it is an object. fsspec's walk leaves out what
        it cannot list."""
        prefix = f"{self.protocol}://"

        def listed(store: Any) -> list[tuple[str, str]]:
            found = store.ls(str(self), detail=True)
            return [(str(entry["name"]).removeprefix(prefix).strip("/"), str(entry["type"])) for entry in found]

        try:
            return self._ask(listed)
        except FileNotFoundError:
            return []

    def _ask(self, question: Callable[[Any], T]) -> T:
        """Ask the store and return its answer; answers.py says what becomes of errors."""

        def asked() -> T:
            with self._store() as store:
                return question(store)

        return ask(self, asked)

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
"""A place of checkpoints: on a disk, or in an object store."""


def place_of(text: str) -> Place:
    """The folder, or the place in an object store, that a config names."""
    if not is_url(text):
        return Path(text)
    protocol, _, key = text.partition("://")
    return ObjectPath(protocol, key.strip("/"))
