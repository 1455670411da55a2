"""`roots train`: tokens -> model, on ranks of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides, Processes
from roots_dist.cli.options import with_options
from roots_dist.cli.quiet import Quiet, quietly, words
from roots_dist.runs.ranks.command import Command

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded
    from roots_dist.config.schema import Config
    from roots_dist.layout import Layout
    from roots_dist.world.mesh import Mesh


def _read(path: str, overrides: Sequence[str]) -> Loaded:
    from roots_dist.cli.read_config import read_config
    from roots_dist.config.load import read
    from roots_dist.errors import ConfigError, Problem

    loaded = read(path, overrides)
    if loaded.config.finetune.init_from is not None:
        expected, fix = (
            "no value, because training starts from random weights",
            f"roots finetune {path}, or leave it out",
        )
        problem = Problem(key="finetune.init_from", found=loaded.config.finetune.init_from, expected=expected, fix=fix)
        raise ConfigError(loaded.located([problem]))
    return read_config(path, overrides)


def check(config: Config) -> None:
    """Check what the run's folder holds, the rows of a task, the names of trained parameters, and whether the run only
    repeats a failure."""
    from roots_dist.config.records import objective_of
    from roots_dist.runs.train.repeats import refuse_repeats
    from roots_dist.storage.checkpoint.same_model import refuse_to_resume

    refuse_to_resume(config)
    refuse_repeats(config)
    if objective_of(config).rows:
        from roots_dist.learning.objectives.task_checks import check_rows

        check_rows(config)
    if config.finetune.strategy in ("partial", "lora"):
        from roots_dist.learning.models import pieces_of
        from roots_dist.learning.models.parameter_locations import depths_of
        from roots_dist.parallel.optim.trainable import trainable
        from roots_dist.parallel.tensor.collectives import TensorParallel

        trainable(config, depths_of(pieces_of(config, TensorParallel())))


def work(config: Config, mesh: Mesh) -> int:
    from roots_dist.runs.train.loop import train

    return train(config, mesh)


def close(config: Config, layout: Layout) -> None:
    from roots_dist.runs.train.loop import close_run

    close_run(config, layout)


TRAIN = Command("train", _read, work, check=check, close=close)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `roots train` and `roots finetune` beside their config."""

    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the resolved config and exit; 2 if it could not run")
    ] = False
    processes: Processes = None
    quiet: Quiet = False


@with_options
def train(
    config: ConfigArgument,
    options: TrainOptions,
    overrides: Overrides = None,
) -> None:
    """Pretrain a model. Without a launcher (torchrun, deepspeed, mpirun, srun) it starts the processes itself.

    Repeating the command resumes from the newest checkpoint, also in another layout. dp is processes / (tp × cp × pp).

    \b
    roots train configs/quickstart.yaml parallel.tp=1 parallel.pp=4 train.steps=50
    torchrun --nproc-per-node 8 -m roots_dist train configs/gpt2-small.yaml \\
        data.train=data/mine/train_text_document
    """
    run_or_print(TRAIN, config, options, overrides or ())


def run_or_print(command: Command, config: str, options: TrainOptions, given: Sequence[str]) -> None:
    """Train as the command does, or print what it would train."""
    if options.print_config:
        from roots_dist.cli.read_config import read_config
        from roots_dist.config.load import to_yaml
        from roots_dist.config.special_tokens import describe
        from roots_dist.runs.ranks.run_on_ranks import ready

        loaded = read_config(config, given)
        resolved = loaded.config
        typer.echo(f"{to_yaml(resolved)}# {describe(resolved.data.tokenizer)}")
        ready(loaded, options.processes or resolved.parallel.least_ranks(), local_size=None)
        return
    from roots_dist.runs.ranks.run_on_ranks import run_on_ranks

    command, arguments = (quietly(command), words(command, config, given)) if options.quiet else (command, ())
    raise typer.Exit(run_on_ranks(command, config, given, options.processes, arguments))
