"""Corpora that come with the package: an input `embedded:NAME` is the path of a compressed jsonl file.

    embedded:state-of-the-union --path_of--> learning/data/readers.py, which reads it as any other file

Where each text is from, its licence and what was mended in it stands beside it, in NAME.LICENCE.md.
"""

from __future__ import annotations

from pathlib import Path

from roots_dist.errors import DataError, Problem

PREFIX = "embedded:"
_FOLDER = Path(__file__).parent / "corpora"
_SUFFIX = ".jsonl.xz"


def names() -> list[str]:
    return sorted(path.name.removesuffix(_SUFFIX) for path in _FOLDER.glob(f"*{_SUFFIX}"))


def path_of(address: str) -> Path:
    """The file behind `embedded:NAME`."""
    name = address.removeprefix(PREFIX)
    if name not in names():
        raise DataError(
            Problem(key="input", found=address, expected=f"{PREFIX} and one of {names()}", fix="choose one of these")
        )
    return _FOLDER / f"{name}{_SUFFIX}"
