"""The options of `roots generate` and `roots chat`. None, (), False: not given. Nothing heavy is imported.

command line --GenerateOptions--> check_options.py, before any process starts --> request.py for decode.py
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How words are chosen, and when a text ends."""

    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens to add at most [default: 100]", show_default=False)
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="below 1 safer, above 1 wilder; 0 is greedy [default: 0.8; t5: 0]", show_default=False
        ),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=1, help="choose among the k likeliest tokens", show_default=False)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1.0, help="choose among the fewest tokens of this probability", show_default=False),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="choose among those with this share of the likeliest's probability",
            show_default=False,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=1e-6, help="above 1: tokens that were there already become less likely", show_default=False),
    ] = None
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token")] = False
    stop: Annotated[
        tuple[str, ...], typer.Option(help="end before this text; may be given again", show_default=False)
    ] = ()
    seed: Annotated[int, typer.Option(help="another number, another text")] = 0

    def given(self, names: tuple[str, ...] = ()) -> list[str]:
        """Which of these options (default: of all) were given."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names or defaults if getattr(self, name) != defaults[name]]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ChatOptions):
    """What is written, with which prompts."""

    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="what the text begins with, or is about", show_default=False)
    ] = None
    prompts: Annotated[
        Path | None, typer.Option(help="file of prompts: lines of txt, or jsonl with a key prompt", show_default=False)
    ] = None
    output: Annotated[Path | None, typer.Option(help="write the answers here, as jsonl", show_default=False)] = None
    beams: Annotated[
        int | None, typer.Option(min=1, help="search for the likeliest texts, so many at a time", show_default=False)
    ] = None
    length_penalty: Annotated[
        float | None,
        typer.Option(help="of --beams: above 0 longer texts, below 0 shorter ones [default: 1]", show_default=False),
    ] = None
    samples: Annotated[
        int | None, typer.Option(min=1, help="answers to each prompt [default: 1]", show_default=False)
    ] = None
    keep_end: Annotated[bool, typer.Option("--keep-end", help="show the token that ended a text")] = False
    raw: Annotated[bool, typer.Option("--raw", help="an instruct model: without its chat template")] = False
    pair: Annotated[str | None, typer.Option(help="the second text, where pairs were learned", show_default=False)] = (
        None
    )
    top: Annotated[
        int | None, typer.Option(min=1, help="encoders: words shown for each mask [default: 5]", show_default=False)
    ] = None
