"""`roots sample`: a training sample as text."""

from __future__ import annotations

from typing import Annotated

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides


def sample(
    config: ConfigArgument,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="step of the run, counted from 0")] = 0,
) -> None:
    """Show a sample of a training step as text: the model's input, its targets, the special tokens. Trains nothing.

    \b
    roots sample configs/t5-quickstart.yaml --step 3
    """
    from roots_dist.cli.read_config import read_config
    from roots_dist.cli.terminal import busy
    from roots_dist.config.special_tokens import describe
    from roots_dist.errors import Problem, UserError
    from roots_dist.learning.objectives.show_sample import sample_lines

    loaded = read_config(config, overrides or ()).config
    if step >= loaded.train.steps:
        expected = f"less than train.steps = {loaded.train.steps}; the first one is 0"
        raise UserError(Problem(key="--step", found=step, expected=expected, fix="choose one of these steps"))
    with busy("opening the data"):
        lines = list(sample_lines(loaded, step))
    for line in lines:
        typer.echo(line)
    typer.echo(describe(loaded.data.tokenizer))
