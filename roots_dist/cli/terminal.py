"""Progress bar for work that is counted in bytes. Shows nothing without a terminal, where only the summary follows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class PrepareProgress(Protocol):
    """Progress as learning/data/prepare.py reports it."""

    @property
    def stage(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def documents(self) -> int: ...


@contextmanager
def progress_bar() -> Iterator[Callable[[PrepareProgress], None]]:
    """Yields a function that shows progress; each stage gets its own line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as shown:
        lines: dict[str, object] = {}

        def report(at: PrepareProgress) -> None:
            if at.stage not in lines:
                lines[at.stage] = shown.add_task(at.stage, total=at.total, documents=0)
            shown.update(lines[at.stage], completed=at.done, total=at.total, documents=at.documents)  # type: ignore[arg-type]

        yield report
