"""Check which options of `roots evaluate` a run supports. No torch, because the command line calls it."""

from __future__ import annotations

from shlex import quote

from roots_dist.config.objectives import named, writing_decoders
from roots_dist.config.records import family_of, is_bare, no_head, objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import Problem
from roots_dist.runs.evaluate.options import EvaluateOptions


def problems(options: EvaluateOptions, config: Config) -> list[Problem]:
    """Problems of the options for this run."""
    found, objective, run = [], objective_of(config), f"a run of {config.objective.name}"
    if options.ngram is not None and not objective.every_token:
        causal = named(lambda r: r.every_token)
        expected = f"a causal run (objective.name={causal}), whose loss an n-gram model can be compared with"
        found.append(Problem(key="--ngram", found=run, expected=expected, fix="leave it out"))
    elif options.ngram is not None and not config.data.train:
        fix = "name it: data.train=data/mine/train_text_document"
        found.append(
            Problem(key="data.train", found=[], expected="the text that the n-gram baseline is counted on", fix=fix)
        )
    if options.tasks and not (family_of(config).is_decoder and objective.answer == "write"):
        expected = f"a decoder that writes (objective.name={writing_decoders()})"
        found.append(Problem(key="--lm-eval", found=run, expected=expected, fix="leave it out"))
    elif options.tasks and config.data.tokenizer is None:
        fix = "name it: data.tokenizer=data/mine/tokenizer.json"
        found.append(
            Problem(key="data.tokenizer", found=None, expected="the run's tokenizer, because tasks are texts", fix=fix)
        )
    for key, value in (("--include-path", options.include_path), ("--limit", options.limit)):
        if value is not None and not options.tasks:
            found.append(Problem(key=key, found=value, expected="--lm-eval with it", fix="add --lm-eval TASKS"))
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        expected, fix = "a file in an existing folder", f"make the folder, or write {options.json.name} here"
        found.append(Problem(key="--json", found=str(options.json), expected=expected, fix=fix))
    if is_bare(config):
        found.append(no_head(config))
    elif not config.data.validation and (options.ngram is not None or not options.tasks):
        expected, example = (
            ("held-out rows", "FILE.jsonl")
            if objective.rows
            else ("a held-out corpus", "data/mine/validation_text_document")
        )
        fix = f"name them: roots evaluate {quote(config.track.folder)} data.validation={example}"
        found.append(Problem(key="data.validation", found=[], expected=expected, fix=fix))
    return found
