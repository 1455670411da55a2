"""`roots evaluate`: score a run on text or rows that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import typer

from roots_dist.cli.arguments import Overrides, Run
from roots_dist.cli.options import with_options
from roots_dist.runs.evaluate.options import EvaluateOptions
from roots_dist.runs.ranks.command import Command, without_training_batch

if TYPE_CHECKING:
    from roots_dist.config.load import Loaded
    from roots_dist.config.schema import Config
    from roots_dist.world.mesh import Mesh


def _read(run: str, overrides: Sequence[str], options: EvaluateOptions = EvaluateOptions()) -> Loaded:
    """Config of the run, with all of the held-out text unless an override says otherwise."""
    import sys

    from roots_dist.config.run_config import config_of_run
    from roots_dist.errors import ConfigError
    from roots_dist.runs.evaluate.check_options import problems

    loaded = config_of_run(run, overrides, {"train.eval_sequences": sys.maxsize})
    if found := problems(options, loaded.config):
        raise ConfigError(found)
    return loaded


def _check(config: Config) -> None:
    """Check the rows that are evaluated; those of training may be gone."""
    from roots_dist.config.records import objective_of

    if objective_of(config).rows and config.data.validation:
        from roots_dist.learning.objectives.task_checks import check_rows

        check_rows(config.changed({"data.train": ()}))


def _work(config: Config, mesh: Mesh, options: EvaluateOptions = EvaluateOptions()) -> None:
    from roots_dist.runs.evaluate.evaluate import evaluate

    evaluate(config, mesh, options)


EVALUATE = Command(
    "evaluate",
    _read,
    _work,
    without_training_batch,
    check=_check,
    trains=False,
    not_required=frozenset(
        {"data.train", "data.tokenizer", "track.folder", "model"}
    ),  # model: memory for optimizer states
)


def evaluation(options: EvaluateOptions) -> Command:
    """EVALUATE with options. An n-gram baseline needs the training text."""
    not_required = EVALUATE.not_required - ({"data.train"} if options.ngram is not None else set())
    return replace(
        EVALUATE, read=partial(_read, options=options), work=partial(_work, options=options), not_required=not_required
    )


@with_options
def evaluate(context: typer.Context, run: Run, options: EvaluateOptions, overrides: Overrides = None) -> None:
    """Score a run's best or newest checkpoint on held-out text: loss, perplexity, bits per byte.

    On tasks it reports accuracy, F1 and Matthews correlation, or exact match; n-grams and lm-eval tasks can be added.

    One process reads any layout's checkpoint. For a larger model, set a layout, or start it with torchrun.

    \b
    roots evaluate runs/quickstart --ngram 3
    roots evaluate runs/quickstart parallel.tp=2 \\
        data.validation=data/mine/validation_text_document
    roots evaluate runs/quickstart --lm-eval lambada_openai,piqa --limit 200
    """
    from roots_dist.runs.ranks.run_on_ranks import run_on_ranks

    raise typer.Exit(run_on_ranks(evaluation(options), str(run), overrides or (), arguments=context.obj))
