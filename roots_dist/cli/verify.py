"""`roots verify`: prove that a layout computes what one process computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides
from roots_dist.cli.options import with_options


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of the comparison."""

    matrix: Annotated[
        bool, typer.Option("--matrix", help="verify the whole grid of layouts, not only the config's")
    ] = False
    steps: Annotated[int, typer.Option(min=2, help="training steps to compare")] = 3


@with_options
def verify(
    config: ConfigArgument,
    options: VerifyOptions,
    overrides: Overrides = None,
) -> None:
    """Prove on this machine's CPU that a layout computes what one process computes: loss, gradients, weights, moments.

    The model is shrunk but keeps its features and degrees (up to 8 processes). Exit code 1 if anything differs.

    \b
    roots verify configs/bloom-176b.yaml
    """
    from roots_dist.cli.read_config import read_config
    from roots_dist.verify.verify import verify as prove

    raise typer.Exit(
        0 if prove(read_config(config, overrides or ()).config, steps=options.steps, matrix=options.matrix) else 1
    )
