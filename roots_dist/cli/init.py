"""`roots init`: a config to begin with, from one of the shipped ones or from five answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from roots_dist.cli.options import with_options

SHIPPED = Path(__file__).parents[2] / "configs"
"""Configs of a checkout. An installed package has none: --from takes a path too."""
FIRST = "gpt-quickstart"
"""Name of quickstart.yaml beside those of the other models."""
SHOWN = 8
"""Number of names that a refusal lists."""
MODELS = ("gpt", "llama", "bloom", "bert", "roberta", "electra", "t5")


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Options of `roots init`: the config to begin with."""

    begin_with: Annotated[
        str | None,
        typer.Option(
            "--from", help="config to begin with: a file, or gpt-quickstart, bert-base …", metavar="NAME",
            show_default=False,
        ),
    ] = None  # fmt: skip


@with_options
def init(
    options: InitOptions,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="new YAML file")] = Path("config.yaml"),
) -> None:
    """Write a commented config: with --from a copy of one that exists, otherwise from the answers to five questions.

    A JSON schema is written beside it, by which editors complete and check its keys.

    \b
    roots init --from gpt-quickstart
    roots init mine.yaml
    """
    import json

    from roots_dist.config.commented import SCHEMA_FILE, commented_yaml, editor_schema
    from roots_dist.config.text import parse_file
    from roots_dist.errors import Problem, UserError
    from roots_dist.files import write_output

    if config.exists():
        fix = "name another file, or remove this one"
        raise UserError(Problem(key="CONFIG", found=str(config), expected="a file that is not there yet", fix=fix))
    schema, content = config.with_name(SCHEMA_FILE), json.dumps(editor_schema(), indent=1) + "\n"
    if schema.exists() and not (schema.is_file() and schema.read_bytes() == content.encode()):
        fix = "remove it if it is of another version, or write the config into another folder"
        raise UserError(Problem(key="CONFIG", found=str(schema), expected="the schema of this version", fix=fix))
    if options.begin_with is None:
        _found(f"{MODELS[0]}-quickstart")  # refused here rather than after the questions
        try:
            model, answers = _ask()
        except typer.Abort:
            if sys.stdin.isatty():  # Ctrl-C
                raise
            expected, fix = (
                "five answers, and the input has ended",
                "name a config to begin with: --from gpt-quickstart",
            )
            raise UserError(Problem(key="answers", found="", expected=expected, fix=fix)) from None
        source = _found(f"{model}-quickstart")
    else:
        source, answers = _found(options.begin_with), {}
    tree = parse_file(source)[0]
    for key, value in answers.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    _check(source, answers)  # refused here rather than in the copy
    write_output("CONFIG", schema, content)
    write_output("CONFIG", config, commented_yaml(tree, f"Begun from {source.name}. docs/config.md lists every key."))
    typer.echo(f"{config}\nnext   roots plan {config}\n       roots train {config}")


def _check(source: Path, answers: Mapping[str, Any]) -> None:
    """Raise ConfigError if the source is none, or if an answer cannot be its value, alone or beside the others."""
    import json
    from dataclasses import replace

    from roots_dist.checks.checks import check
    from roots_dist.config.load import COMMAND_LINE, read
    from roots_dist.errors import ConfigError

    try:
        loaded = read(source, [f"{key}={json.dumps(value)}" for key, value in answers.items()])
        problems = [p for p in check(loaded.config, loaded.config.parallel.least_ranks()) if p.key in answers]
    except ConfigError as error:
        problems = [*error.problems]
    if problems:
        told = (replace(p, origin="") if p.origin == COMMAND_LINE else p for p in problems)
        raise ConfigError([*told])


def _ask() -> tuple[str, Mapping[str, Any]]:
    """The kind of model, and the answers by their keys."""
    from roots_dist.idx_format import TOKENIZER

    model = ""
    while model not in MODELS:
        model = typer.prompt(f"Model ({', '.join(MODELS)})", default="gpt").strip().lower()
    corpus = typer.prompt("Folder that roots prepare has written", default="data/sotu").rstrip("/")
    tp = typer.prompt("Tensor-parallel ranks (tp)", default=1, type=int)
    steps = typer.prompt("Training steps", default=250, type=int)
    folder = typer.prompt("Folder of the run", default=f"runs/{model}")
    return model, {
        "data.train": f"{corpus}/train_text_document",
        "data.validation": f"{corpus}/validation_text_document",
        "data.tokenizer": f"{corpus}/{TOKENIZER}",
        "parallel.tp": tp,
        "parallel.pp": 1,
        "train.steps": steps,
        "track.folder": folder,
    }


def _found(name: str) -> Path:
    """The file of this name, or the shipped config, with or without its suffix; gpt-quickstart is quickstart.yaml."""
    from roots_dist.errors import Problem, UserError

    plain = name.removesuffix(".yaml")
    shipped = SHIPPED / f"{'quickstart' if plain == FIRST else plain}.yaml"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    names = [FIRST if path.stem == "quickstart" else path.stem for path in SHIPPED.glob("*.yaml")]
    close = _close(Path(plain).name, names)
    shown = close or sorted(one for one in names if one.endswith("quickstart"))
    known = f", such as {', '.join(shown[:SHOWN])}" if shown else "; this installation has no configs"
    fix = f"write --from {close[0]}, or give the path of a YAML file" if close else "give the path of a YAML file"
    raise UserError(Problem(key="--from", found=name, expected=f"a config{known}", fix=fix))


def _close(name: str, names: Sequence[str]) -> list[str]:
    """The names that may be meant: first those that begin with what was typed, then those that have it inside; if there
    are none, those that are spelt alike, as a whole or up to their first hyphen. Quickstarts come first."""
    import difflib

    typed = name.lower().replace("_", "-")
    ordered = sorted(names, key=lambda one: (not one.endswith("quickstart"), one != FIRST, one))
    found = [one for one in ordered if one.startswith(typed)] + [one for one in ordered if typed in one]
    if not found:
        parts = difflib.get_close_matches(typed.partition("-")[0], {one.partition("-")[0] for one in names})
        found = difflib.get_close_matches(typed, names)
        found += [one for part in parts for one in ordered if one.partition("-")[0] == part]
    return list(dict.fromkeys(found)) if typed else []
