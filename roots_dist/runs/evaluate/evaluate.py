"""`roots evaluate RUN`: score a run's checkpoint on held-out text, against baselines and on lm-eval tasks, in one
process or in any layout.

    config.yaml --> Passes --load_weights--> score, answers, lm-eval (all ranks); n-grams (rank 0) --> score_tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from roots_dist.assembly.passes import Passes, build_passes
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.files import write_output
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.learning.objectives import make_objective
from roots_dist.learning.objectives.task_checks import row_remarks
from roots_dist.logs import counted, still_busy
from roots_dist.runs.evaluate import score_tables as show
from roots_dist.runs.evaluate.answers import answer_questions
from roots_dist.runs.evaluate.baseline import ngram_baselines
from roots_dist.runs.evaluate.harness import open_tasks, run_harness
from roots_dist.runs.evaluate.held_out import Score, score_held_out
from roots_dist.runs.evaluate.options import EvaluateOptions
from roots_dist.runs.evaluate.references import references_to_evaluate
from roots_dist.runs.evaluate.sources import bytes_per_token, names
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.world.batch import MicroBatch, Objective, QuestionObjective
from roots_dist.world.mesh import Mesh


def evaluate(config: Config, mesh: Mesh, options: EvaluateOptions = EvaluateOptions()) -> Score | None:
    """Evaluate the run and show the results on rank 0. Returns the score of the held-out text, equal on every rank;
    None if there is none. Collective over the world."""
    run = Path(config.track.folder)
    with still_busy(f"opening {run}"):
        checkpoint = best_or_newest(run, mesh)
        tasks = (
            open_tasks(options, mesh.rank) if options.tasks else None
        )  # errors in tasks must show before hours of scoring
        passes = build_passes(config, mesh)
        objective = make_objective(config)
        held_out = _open_held_out(passes, objective) if config.data.validation else None
        load_weights(checkpoint, passes.model.params, mesh, verify=False)
    found = None if held_out is None else _score_held_out_text(passes, checkpoint, objective, held_out, options)
    if options.json is not None and found is not None and mesh.rank == 0:
        content = {"checkpoint": str(checkpoint), **found.metrics()}
        write_output("--json", options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if tasks is not None:
        results = run_harness(passes, tasks, options.limit, run)
        if mesh.rank == 0:
            show.show("", show.harness_table(results))
    return found


def _open_held_out(passes: Passes, objective: Objective) -> Batches:
    """The held-out samples. The weights of `passes` may be others afterwards."""
    config, mesh = passes.config, passes.mesh
    held_out = Batches.open(config, objective, config.data.validation, mesh.dp.rank, mesh.dp.size)
    if not objective_of(config).has_references:
        return held_out
    folder = Path(config.track.folder)
    return held_out.with_sources(references_to_evaluate(passes, objective, held_out.sources, folder))


def _score_held_out_text(
    passes: Passes, checkpoint: Place, objective: Objective, held_out: Batches, options: EvaluateOptions
) -> Score:
    config, mesh = passes.config, passes.mesh
    sequences = min(config.train.eval_sequences, held_out.num_samples)

    def progress(batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
        if mesh.rank:
            return batches
        total = -(-sequences // (config.train.micro_batch * mesh.dp.size)) if len(config.data.validation) == 1 else None
        if not sys.stderr.isatty():
            return counted(batches, "evaluating", total)
        return track(batches, "evaluating", total=total, console=Console(stderr=True), transient=True)

    found = score_held_out(passes, objective, held_out, sequences, bytes_per_token(config.data.validation), progress)
    found = replace(found, sources=_with_bytes(found, config))
    if mesh.rank == 0:
        show.show(*row_remarks(config.changed({"data.train": ()}), objective))
        show.show(show.score_table(checkpoint, sequences, found))
        if found.sources:
            show.show("", show.sources_table(found))
        for table in show.classes_tables(found) if found.confusion is not None else ():
            show.show("", table)
    if isinstance(objective, QuestionObjective) and options.answers:
        codec = load_codec(present(config.data.tokenizer))
        with still_busy("answering questions"):
            answers = answer_questions(passes, objective, held_out, codec, options.answers)
        if mesh.rank == 0:
            show.show("", *show.answers_lines(answers))
    if options.ngram is not None and mesh.rank == 0:
        with still_busy("counting n-grams"):
            baselines = ngram_baselines(config, held_out, sequences, options.ngram, options.ngram_tokens)
        show.show("", *show.ngram_table(baselines, found))
    return found


def _with_bytes(found: Score, config: Config) -> dict[str, Score]:
    """Scores of the sources, each with the bytes per token of its own text."""
    sources = dict(zip(names(config.data.validation), config.data.validation))
    return {name: replace(one, bytes_per_token=bytes_per_token([sources[name]])) for name, one in found.sources.items()}
