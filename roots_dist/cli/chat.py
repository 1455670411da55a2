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


def _check(config: Config, **given: Any) -> None:
    from roots_dist.runs.generate.chat import check

    check(config, **given)


def _work(config: Config, mesh: Mesh, **given: Any) -> None:
    from roots_dist.runs.generate.chat import chat

    chat(config, mesh, **given)


CHAT = replace(GENERATE, name="chat", work=_work, check=_check)


@with_options
def chat(run: Run, options: ChatOptions, overrides: Overrides = None) -> None:
    """Converse with a run's model in this terminal. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C an
    answer.

    A model that was not taught to (roots finetune, objective.name=instruct) talks as its text does.

    \b
    roots chat runs/quickstart --temperature 0.7 --max-tokens 60
    """
    from roots_dist.runs.ranks.run_on_ranks import run_on_ranks

    verb = with_request(CHAT, GenerateOptions(**vars(options)), read_line=_next_line, show=show)
    raise typer.Exit(run_on_ranks(verb, str(run), overrides or ()))


def _next_line() -> str:
    """What the user says next, with the usual keys to edit it; from a file no prompt is shown. Raises EOFError at the
    end."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401
    return input("> ")
