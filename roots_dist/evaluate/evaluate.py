"""`roots evaluate RUN`: a run's chosen checkpoint held against held-out text, baselines and other people's tasks, in one
process or in any layout.

    run's config.yaml --of_run--> Passes --load_weights--> score, answers, lm-eval (all ranks); n-grams (rank 0) --> show.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from roots_dist.checkpoint.keep import chosen
from roots_dist.checkpoint.load import load_weights
from roots_dist.config.schema import Config
from roots_dist.data.batches import Batches
from roots_dist.data.tokenizer import load_codec
from roots_dist.evaluate import show
from roots_dist.evaluate.answers import ASKS, answered
from roots_dist.evaluate.baseline import compared
from roots_dist.evaluate.harness import harnessed, open_tasks
from roots_dist.evaluate.held_out import Score, score_held_out
from roots_dist.evaluate.sources import bytes_per_token, names
from roots_dist.evaluate.wishes import Wishes
from roots_dist.mesh import Mesh
from roots_dist.objectives import make_objective
from roots_dist.objectives.base import MicroBatch
from roots_dist.train.build import Passes, build_passes


def evaluate(config: Config, mesh: Mesh, wishes: Wishes = Wishes()) -> Score | None:
    """Of the held-out text, the same on every rank; None where there is none. Collective over the world. Rank 0 shows it."""
    run = Path(config.track.folder)
    checkpoint = chosen(run)
    tasks = open_tasks(wishes, mesh.rank) if wishes.tasks else None  # what is wrong with them shows before hours of scoring
    passes = build_passes(config, mesh)
    load_weights(checkpoint, passes.model.params, mesh)
    found = _of_held_out_text(passes, checkpoint, wishes) if config.data.validation else None
    if tasks is not None:
        results = harnessed(passes, tasks, wishes.limit, run)
        if mesh.rank == 0:
            show.show("", show.harness_table(results))
    return found


def _of_held_out_text(passes: Passes, checkpoint: Path, wishes: Wishes) -> Score:
    config, mesh = passes.config, passes.mesh
    objective = make_objective(config)
    held_out = Batches.open(config, objective, config.data.validation, mesh.dp.rank, mesh.dp.size)
    sequences = min(config.train.eval_sequences, held_out.num_samples)

    def watched(batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
        if mesh.rank or not sys.stderr.isatty():
            return batches
        total = -(-sequences // (config.train.micro_batch * mesh.dp.size)) if len(config.data.validation) == 1 else None
        return track(batches, "evaluating", total=total, console=Console(stderr=True), transient=True)

    found = score_held_out(passes, objective, held_out, sequences, bytes_per_token(config.data.validation), watched)
    found = replace(found, sources=_with_bytes(found, config))
    if mesh.rank == 0:
        show.show(show.score_table(checkpoint, sequences, found))
        if found.sources:
            show.show("", show.sources_table(found))
        for table in show.classes_tables(found) if found.table is not None else ():
            show.show("", table)
    if config.objective.name in ASKS and wishes.answers:
        answers = answered(passes, objective, held_out, load_codec(config.data.tokenizer), wishes.answers)
        if mesh.rank == 0:
            show.show("", *show.answers_lines(answers))
    if wishes.ngram is not None and mesh.rank == 0:
        baselines = compared(config, held_out, sequences, wishes.ngram, wishes.ngram_tokens)
        show.show("", *show.compared_table(baselines, found))
    return found


def _with_bytes(found: Score, config: Config) -> dict[str, Score]:
    """The sources, each with the bytes of its own tokens."""
    given = dict(zip(names(config.data.validation), config.data.validation))
    return {name: replace(one, bytes_per_token=bytes_per_token([given[name]])) for name, one in found.sources.items()}
