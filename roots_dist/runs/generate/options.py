"""Options of `roots generate` and `roots chat`. None, () and False mean not given. Imports nothing heavy.

command line --GenerateOptions--> check_options.py, before any process starts --> request.py for decode.py
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options for the choice of tokens and the end of a text."""

    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="largest number of tokens to generate [default: 100]", show_default=False)
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="sampling temperature; 0 is greedy [default: the import's, or 0.8; t5: 0]", show_default=False
        ),
    ] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="sample from the k likeliest tokens", show_default=False)] = (
        None
    )
    top_p: Annotated[
        float | None,
        typer.Option(
            min=1e-6, max=1.0, help="sample from the fewest tokens with this total probability", show_default=False
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="sample from tokens with this fraction of the top probability",
            show_default=False,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=1e-6, help="above 1: make earlier tokens less likely", show_default=False),
    ] = None
    greedy: Annotated[bool, typer.Option("--greedy", help="always take the likeliest token")] = False
    stop: Annotated[
        tuple[str, ...], typer.Option(help="stop before this text; may be repeated", show_default=False)
    ] = ()
    seed: Annotated[int, typer.Option(help="random seed")] = 0

    def given(self, names: tuple[str, ...] = ()) -> list[str]:
        """Names among `names` (default: all options) whose option was given."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names or defaults if getattr(self, name) != defaults[name]]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ChatOptions):
    """Prompts, output, and how answers are searched for."""

    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="text to continue, answer, fill or label", show_default=False)
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(help="file of prompts: lines of txt, or jsonl with the key prompt", show_default=False),
    ] = None
    output: Annotated[Path | None, typer.Option(help="jsonl file for the answers", show_default=False)] = None
    beams: Annotated[
        int | None, typer.Option(min=1, help="beam search with this number of beams", show_default=False)
    ] = None
    length_penalty: Annotated[
        float | None,
        typer.Option(help="with --beams: above 0 favours longer texts [default: 1]", show_default=False),
    ] = None
    samples: Annotated[int | None, typer.Option(min=1, help="answers per prompt [default: 1]", show_default=False)] = (
        None
    )
    keep_end: Annotated[bool, typer.Option("--keep-end", help="show the token that ended the text")] = False
    raw: Annotated[bool, typer.Option("--raw", help="instruct models: no chat template")] = False
    pair: Annotated[str | None, typer.Option(help="second text, for models of text pairs", show_default=False)] = None
    top: Annotated[
        int | None, typer.Option(min=1, help="encoders: predictions shown per mask [default: 5]", show_default=False)
    ] = None
