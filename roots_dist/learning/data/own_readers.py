"""Files that an extension reads: a function from a path to the rows of the file.

Extension.readers[".xml"](path) --rows_of--> (number, row), … --> rows.py (fine-tuning), readers.py (prepare)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from roots_dist.config.extensions import NAME, OwnReader
from roots_dist.errors import DataError, Problem


class FailedReader(Exception):
    """The reader raised an error, or gave something that is no row."""


def own_reader(path: Path, own: Mapping[str, OwnReader], taken: Collection[str]) -> OwnReader | None:
    """The reader of the file's last suffix, if there is one. Raises DataError if an extension names a suffix that is
    taken, or that is none."""
    for suffix in own:
        if suffix in taken or not suffix.startswith(".") or suffix != suffix.lower():
            expected = f"a suffix in lower case that is not one of {', '.join(taken)}"
            fix = 'choose another one, as ".xml"'
            raise DataError(Problem(key=f"{NAME}.readers", found=suffix, expected=expected, fix=fix))
    return own.get(path.suffix.lower())


def rows_of(reader: OwnReader, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row of a file with its number, counted from 1. Raises FailedReader, after the rows before."""
    number = 0
    try:
        for number, row in enumerate(reader(path), 1):
            if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
                raise FailedReader(f"it gave {type(row).__name__}, not a mapping of column names")
            yield number, dict(row)
    except (FailedReader, GeneratorExit):
        raise
    except Exception as error:  # whatever a user's code raises
        raise FailedReader(f"it raised {type(error).__name__} after row {number}: {error}") from error
