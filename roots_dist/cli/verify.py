"""`roots verify`: prove that a layout computes what one process computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides
from roots_dist.cli.options import with_options


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of the comparison."""

    matrix: Annotated[
        bool, typer.Option("--matrix", help="verify the whole grid of layouts, not only the config's")
    ] = False
    steps: Annotated[int, typer.Option(min=2, help="training steps to compare")] = 4
    world_size: Annotated[
        int | None, typer.Option(min=1, help="processes of the run; default: any number of data ranks has to work")
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="bf16: also by the distance from float64; default: as the config says"),
    ] = None
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="where the processes compute; several may share a GPU")
    ] = "cpu"


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
    from roots_dist.verify.verify import Wanted
    from roots_dist.verify.verify import verify as prove

    read = read_config(config, overrides or ()).config
    wanted = Wanted(
        steps=options.steps,
        world_size=options.world_size,
        device=options.device,
        bf16=(options.precision or read.train.precision) == "bf16",
    )
    raise typer.Exit(0 if prove(read, wanted, matrix=options.matrix) else 1)
