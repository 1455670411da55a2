"""`--quiet`: a run that says nothing but warnings and errors. Its files are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

from roots_dist.runs.ranks.command import Command

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but warnings and errors")]


def quietly(command: Command) -> Command:
    """The command without progress, banner and closing lines on any rank."""
    close = None if command.close is None else partial(_silenced, command.close)
    return replace(command, work=partial(_silenced, command.work), close=close, say=_nothing)


def _nothing(text: str) -> None:
    pass


def words(command: Command, subject: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The command line with which ranks are started that are quiet too."""
    return (command.name, subject, *overrides, "--quiet")


def _silenced(function: Callable[..., Any], *arguments: object) -> Any:
    import logging
    import os

    logging.getLogger("roots_dist").setLevel(logging.WARNING)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return function(*arguments)
