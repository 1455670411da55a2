"""The folder of a corpus: one process writes to it at a time, and it is complete or absent.

prepare.py --lock, up_to_date--> .partial --publish--> tokens, tokenizer and the files beside it, manifest.json
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roots_dist.config.special_tokens import COMPANIONS
from roots_dist.errors import DataError, Problem
from roots_dist.files import why_not_written
from roots_dist.idx_format import MANIFEST
from roots_dist.learning.data.manifest import PAIRS, CorpusManifest, Options, read_manifest

COPIED = (*COMPANIONS, "chat_template.jinja")
"""Files that are copied with a given tokenizer."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the folder against a second process. The lock belongs to the process and ends with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _refused(folder, f"a folder that can be created ({error.strerror})", "choose another") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        expected = "no other process writing there, but another `roots prepare` is running"
        raise _refused(folder, expected, "wait until it has finished") from error
    try:
        yield
    except OSError as error:
        expected = f"a folder that can be written ({why_not_written(error)})"
        raise _refused(folder, expected, "check free space and permissions") from error
    finally:
        os.close(descriptor)


def _refused(folder: Path, expected: str, fix: str) -> DataError:
    return DataError(Problem(key="output", found=str(folder), expected=expected, fix=fix))


def up_to_date(folder: Path, files: list[Path], options: Options) -> CorpusManifest | None:
    """The manifest, if it describes these inputs and options and its outputs are unchanged."""
    try:
        found = read_manifest(folder)
    except DataError:
        return None  # damaged: prepare again
    if found is None:
        return None
    same = (
        found.options == options
        and [file.path for file in found.inputs] == [str(path) for path in files]
        and all(file.is_unchanged(path) for file, path in zip(found.inputs, files))
        and all(file.is_unchanged(folder / file.path) for file in found.outputs)
    )
    return found.model_copy(update={"reused": True}) if same else None


def publish(partial: Path, folder: Path, manifest: CorpusManifest) -> None:
    """Move the files into place. A folder without a manifest is unfinished: the new one is moved last."""
    old = _given_outputs(folder)
    written = partial / MANIFEST
    with written.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in PAIRS:
        (folder / name).unlink(missing_ok=True)
    for name in old - {path.name for path in partial.iterdir()}:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(partial.iterdir()):
        if path.name != MANIFEST:
            os.replace(path, folder / path.name)
    os.replace(written, folder / MANIFEST)


def _given_outputs(folder: Path) -> set[str]:
    """Return the names in COPIED that an earlier `roots prepare` wrote there: with another tokenizer they are wrong."""
    try:
        found = read_manifest(folder)
    except DataError:
        return set()
    return {file.path for file in found.outputs} & set(COPIED) if found else set()
