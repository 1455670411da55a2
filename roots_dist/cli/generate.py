"""`roots generate`: a model writes, fills masks, or labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from roots_dist.cli.arguments import Overrides, Run
from roots_dist.cli.options import with_options
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.ranks.command import Command, without_training_batch

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded
    from roots_dist.config.schema import Config
    from roots_dist.world.mesh import Mesh


def _read(run: str, overrides: Sequence[str]) -> Loaded:
    """Config of the run, on a GPU if there is one, without its corpora, which are not read, and what asks for them."""
    from roots_dist.config.run_config import config_of_run

    loaded = config_of_run(run, overrides, {"train.device": "auto"})
    unread = {"data.train": (), "data.validation": (), "finetune.patience": 0}
    return replace(loaded, config=loaded.config.changed(unread))


def _check(config: Config, **options: Any) -> None:
    from roots_dist.runs.generate.generate import check

    check(config, **options)


def _work(config: Config, mesh: Mesh, **options: Any) -> None:
    from roots_dist.runs.generate.generate import generate

    generate(config, mesh, **options)


GENERATE = Command(
    "generate",
    _read,
    _work,
    without_training_batch,
    not_required=frozenset({"data.train", "track.folder", "model"}),
    check=_check,
    uses_all_gpus=False,
    trains=False,
)


def with_request(command: Command, options: GenerateOptions, **functions: object) -> Command:
    """GENERATE or CHAT with the options of the command line and the functions that read and show."""
    return replace(
        command, work=partial(command.work, options=options, **functions), check=partial(command.check, options=options)
    )


@with_options
def generate(
    context: typer.Context,
    run: Run,
    options: GenerateOptions,
    overrides: Overrides = None,
) -> None:
    """Generate with a run's checkpoint, whatever layout wrote it: continue a text, answer it, fill its masks, label it.

    One process reads any layout's checkpoint. For a larger model, set a layout, or start it with torchrun.

    \b
    roots generate runs/quickstart "The state of the Union" \\
        --max-tokens 200 --top-p 0.9
    roots generate runs/t5-quickstart "The <extra_id_0> of the Union" \\
        --beams 4 parallel.tp=2
    roots generate runs/bert-quickstart "The [MASK] of the Union" --top 3
    """
    from roots_dist.config.run_config import has_origin
    from roots_dist.runs.ranks.run_on_ranks import run_on_ranks

    if options.prompts is not None and options.prompt is not None and re.match(r"\w+\.\w+=", options.prompt):
        overrides = [options.prompt, *(overrides or ())]  # with a file there is no prompt before the overrides
        options = replace(options, prompt=None)
    if options.prompt is not None and not run.exists() and has_origin(Path(options.prompt)):
        from roots_dist.errors import Problem, UserError

        fix = f"roots generate {quote(options.prompt)} {quote(str(run))}"
        raise UserError(Problem(key="RUN", found=str(run), expected="the run first, and the prompt after it", fix=fix))
    if options.prompt is not None and (stray := [word for word in overrides or () if "=" not in word]):
        from roots_dist.errors import Problem, UserError

        whole = " ".join([options.prompt, *stray])
        fix = f"put the prompt into quotes: roots generate {run} {quote(whole)}"
        raise UserError(Problem(key="prompt", found=whole, expected="a prompt that is one word of the shell", fix=fix))
    command = with_request(GENERATE, options, show=show)
    raise typer.Exit(run_on_ranks(command, str(run), overrides or (), arguments=context.obj))


def show(text: str) -> None:
    """Show text at once, also in the middle of a line."""
    typer.echo(text, nl=False)
