"""`roots finetune`: a model to one for a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides, Processes
from roots_dist.cli.train import check, work
from roots_dist.runs.ranks.verb import Verb

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded


def _read(path: str, overrides: Sequence[str]) -> Loaded:
    from roots_dist.cli.read_config import read_config
    from roots_dist.config.load import read
    from roots_dist.errors import ConfigError, Problem

    asked = read(path, overrides)
    if asked.config.finetune.init_from is None:
        expected, fix = (
            "the folder of a run, or of an import, to start from",
            "set finetune.init_from=RUN, or begin anew with roots train",
        )
        raise ConfigError(asked.located([Problem(key="finetune.init_from", found=None, expected=expected, fix=fix)]))
    return read_config(path, overrides)


FINETUNE = Verb("finetune", _read, work, check=check)


def finetune(config: ConfigArgument, overrides: Overrides = None, processes: Processes = None) -> None:
    """Go on from a run or an import with a task: classes of texts, pairs or words, instructions, text to text.

    Rows of jsonl or csv; all of the model learns, some of it, more and more of it, or low-rank adapters. The model
    itself need not be described: it is finetune.init_from's. Repeating the command resumes; the best checkpoint is
    kept.

    \b
    roots finetune configs/bert-languages.yaml finetune.strategy=lora parallel.tp=1
    """
    from roots_dist.runs.ranks.run_on_ranks import run_on_ranks

    raise typer.Exit(run_on_ranks(FINETUNE, config, overrides or (), processes))
