"""Progress of long work: a bar on a terminal where bytes are counted, else a line now and then."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import typer


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
    if not sys.stderr.isatty():
        with _lines_now_and_then() as report_in_lines:
            yield report_in_lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr)) as shown:
        lines: dict[str, object] = {}

        def report(at: PrepareProgress) -> None:
            if at.stage not in lines:
                lines[at.stage] = shown.add_task(at.stage, total=at.total, documents=0)
            shown.update(lines[at.stage], completed=at.done, total=at.total, documents=at.documents)  # type: ignore[arg-type]

        yield report


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the body as Ctrl-C does, so that its processes and temporary folders go with it. The
    exit code is 128 + the signal. One that is ignored, as SIGHUP under nohup, stays ignored."""

    def end(number: int, _: object) -> None:
        for caught in before:
            signal.signal(caught, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise SystemExit(128 + number)

    before = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        before = []
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say on stderr every now and then that the body is not done yet, if it takes more than a few seconds."""
    from functools import partial

    from roots_dist.logs import still_busy

    with still_busy(what, partial(typer.echo, err=True)):
        yield


@contextmanager
def _lines_now_and_then() -> Iterator[Callable[[PrepareProgress], None]]:
    """Print a line now and then, and nothing for work of a few seconds. A tokenizer that is trained reports nothing for
    a long time once it has read its text."""
    from roots_dist.logs import EVERY_S, FIRST_S, still_busy

    next_at = time.monotonic() + FIRST_S

    def report(at: PrepareProgress) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + EVERY_S
            share = at.done / max(1, at.total)
            typer.echo(f"{at.stage}: {share:.0%} of the text, {at.documents:,} documents", err=True)

    def say_if_silent(text: str) -> None:
        if time.monotonic() >= next_at:
            typer.echo(text, err=True)

    with still_busy("preparing", say_if_silent, EVERY_S):
        yield report
