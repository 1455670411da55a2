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
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 24,
            help="processes of the whole run [default: any number of data ranks]",
            show_default=False,
        ),
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="bf16: also by the distance from float64; default: as the config says"),
    ] = None
    exact: Annotated[
        bool, typer.Option("--exact", help="compare bits instead, with train.exact, in the dtype that trains")
    ] = False
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="where the processes compute; several may share a GPU")
    ] = "cpu"


@with_options
def verify(
    config: ConfigArgument,
    options: VerifyOptions,
    overrides: Overrides = None,
) -> None:
    """Prove on this machine that a layout computes what one process computes: loss, gradients, weights, evaluation.

    The trainer runs on a small model with the same features and degrees (up to 12 processes). Exit code 1 if anything
    differs, 2 for what `roots train` would refuse.

    \b
    roots verify configs/bloom-176b.yaml --processes 384
    roots verify configs/llama-3-8b.yaml --exact
    """
    from roots_dist.cli.read_config import read_config
    from roots_dist.environment import gpus
    from roots_dist.errors import UserError
    from roots_dist.runs.ranks.run_on_ranks import ready

    loaded = read_config(config, overrides or ())
    parallel, train = loaded.config.parallel, loaded.config.train
    layout = ready(loaded, options.processes or parallel.least_ranks(), local_size=None)
    if options.device == "cuda" and not gpus():
        raise UserError("--device cuda: expected an NVIDIA GPU on this machine, found none. Fix: use --device cpu.")

    from roots_dist.cli.terminal import busy, ended_by_signals
    from roots_dist.verify.verify import Wanted
    from roots_dist.verify.verify import verify as prove

    wanted = Wanted(
        steps=options.steps,
        dp=layout.dp if options.processes else None,
        device=options.device,
        bf16=(options.precision or train.precision) == "bf16",
        exact=options.exact,
    )
    with ended_by_signals(), busy("comparing layouts"):
        passed = prove(loaded.config, wanted, matrix=options.matrix)
    raise typer.Exit(0 if passed else 1)
