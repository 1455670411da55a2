"""`roots finetune`: a pretrained model -> a model for a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from roots_dist.cli.arguments import ConfigArgument, Overrides
from roots_dist.cli.options import with_options
from roots_dist.cli.train import TrainOptions, check, close, run_or_print, work
from roots_dist.runs.ranks.command import Command

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded


def _read(path: str, overrides: Sequence[str]) -> Loaded:
    from roots_dist.cli.read_config import read_config
    from roots_dist.config.load import read
    from roots_dist.errors import ConfigError, Problem

    loaded = read(path, overrides)
    if loaded.config.finetune.init_from is None:
        expected, fix = (
            "the folder of a run or an import to start from",
            "set finetune.init_from=RUN, or train from scratch with roots train",
        )
        raise ConfigError(loaded.located([Problem(key="finetune.init_from", found=None, expected=expected, fix=fix)]))
    return read_config(path, overrides)


FINETUNE = Command("finetune", _read, work, check=check, close=close)


@with_options
def finetune(
    config: ConfigArgument,
    options: TrainOptions,
    overrides: Overrides = None,
) -> None:
    """Fine-tune a run or an import on a task: classes of texts, pairs or words, instructions, text to text.

    Rows come from jsonl or csv. Full, partial, progressive or low-rank (LoRA) training; the model's shape comes from
    finetune.init_from. Repeating the command resumes; the best checkpoint is kept.

    \b
    roots finetune configs/bert-languages.yaml \\
        finetune.strategy=lora parallel.tp=1
    """
    run_or_print(FINETUNE, config, options, overrides or ())
