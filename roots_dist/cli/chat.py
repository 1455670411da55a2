"""`roots chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from roots_dist.cli.arguments import Overrides, Run
from roots_dist.cli.generate import GENERATE, show, with_request
from roots_dist.cli.options import with_options
from roots_dist.runs.generate.options import ChatOptions, GenerateOptions

if TYPE_CHECKING:
    from roots_dist.config.schema import Config
    from roots_dist.world.mesh import Mesh


def _check(config: Config, **options: Any) -> None:
    from roots_dist.runs.generate.chat import check

    check(config, **options)


def _work(config: Config, mesh: Mesh, **options: Any) -> None:
    from roots_dist.runs.generate.chat import chat

    chat(config, mesh, **options)


CHAT = replace(GENERATE, name="chat", work=_work, check=_check)


@with_options
def chat(run: Run, options: ChatOptions, overrides: Overrides = None) -> None:
    """Converse with a run's model in this terminal. /reset clears the history, /exit or Ctrl-D ends it.

    Ctrl-C stops an answer. A model without instruction tuning (roots finetune, objective.name=instruct) continues text
    like its training data.

    \b
    roots chat runs/quickstart --temperature 0.7 --max-tokens 60
    """
    from roots_dist.runs.ranks.run_on_ranks import run_on_ranks

    command = with_request(CHAT, GenerateOptions(**vars(options)), read_line=_next_line, show=show)
    raise typer.Exit(run_on_ranks(command, str(run), overrides or ()))


def _next_line() -> str:
    """Next line of the user, with line editing; no prompt is shown if input is a file. Raises EOFError at the end."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401
    return input("> ")
