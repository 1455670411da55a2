"""Corpora that are shipped with the package: an input `embedded:NAME` names a compressed jsonl file.

    embedded:state-of-the-union --path_of--> learning/data/readers.py, which reads it like any other file

NAME.LICENCE.md beside it states the source of each text, its licence and the corrections.
"""

from __future__ import annotations

from pathlib import Path

from roots_dist.errors import DataError, Problem

PREFIX = "embedded:"
_FOLDER = Path(__file__).parent / "corpora"
_SUFFIX = ".jsonl.xz"


def names() -> list[str]:
    """Names of all embedded corpora."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in _FOLDER.glob(f"*{_SUFFIX}"))


def path_of(address: str) -> Path:
    """Path of the file behind `embedded:NAME`."""
    name = address.removeprefix(PREFIX)
    if name not in names():
        raise DataError(
            Problem(key="input", found=address, expected=f"{PREFIX} and one of {names()}", fix="choose one of these")
        )
    return _FOLDER / f"{name}{_SUFFIX}"
