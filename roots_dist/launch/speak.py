"""The verbs that let a model speak: `roots generate` and `roots chat`, with the options that they share.

    command line --Asked--> verbs.py's Verb --start.py--> generate/generate.py, generate/chat.py on every rank
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from roots_dist.launch.arguments import Overrides, Run

MaxTokens = Annotated[int | None, typer.Option(min=1, help="tokens to add at most [default: 100]", show_default=False)]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="below 1 safer, above 1 wilder; 0 is greedy [default: 0.8; t5: 0]", show_default=False),
]
TopK = Annotated[int | None, typer.Option(min=1, help="choose among the k likeliest tokens", show_default=False)]
TopP = Annotated[
    float | None,
    typer.Option(min=1e-6, max=1.0, help="choose among the fewest tokens of this probability", show_default=False),
]
MinP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="choose among those with this share of the likeliest's probability", show_default=False),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(min=1e-6, help="above 1: tokens that were there already become less likely", show_default=False),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="always the likeliest token")]
Stop = Annotated[list[str] | None, typer.Option(help="end before this text; may be given again", show_default=False)]


def generate(
    ctx: typer.Context,
    run: Run,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="what the text begins with, or is about", show_default=False),
    ] = None,
    overrides: Overrides = None,
    prompts: Annotated[
        Path | None, typer.Option(help="file of prompts: lines of txt, or jsonl with a key prompt", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write the answers here, as jsonl", show_default=False)] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    greedy: Greedy = False,
    beams: Annotated[
        int | None, typer.Option(min=1, help="search for the likeliest texts, so many at a time", show_default=False)
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="of --beams: above 0 longer texts, below 0 shorter ones [default: 1]", show_default=False)
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="answers to each prompt [default: 1]", show_default=False)] = None,
    stop: Stop = None,
    keep_end: Annotated[bool, typer.Option("--keep-end", help="show the token that ended a text")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="an instruct model: without its chat template")] = False,
    pair: Annotated[str | None, typer.Option(help="the second text, where pairs were learned", show_default=False)] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="encoders: words shown for each mask [default: 5]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="another number, another text")] = 0,
) -> None:
    """Write with a run's checkpoint, whatever layout wrote it: go on with a text, answer it, fill its masks, label it.

    One process answers in any case; for a model that needs more, ask for a layout, or start it with torchrun.

    \b
    roots generate runs/quickstart "The state of the Union" --max-tokens 200 --top-p 0.9
    roots generate runs/t5-quickstart "The <extra_id_0> of the Union" --beams 4 parallel.tp=2
    roots generate runs/bert-quickstart "The [MASK] of the Union" --top 3
    """
    from roots_dist.generate.asked import Asked
    from roots_dist.launch.start import start
    from roots_dist.launch.verbs import GENERATE, asking

    if prompts is not None and prompt is not None and re.match(r"\w+\.\w+=", prompt):
        prompt, overrides = None, [prompt, *(overrides or ())]  # with a file there is no prompt before the overrides
    asked = Asked(
        prompt=prompt, prompts=prompts, output=output, pair=pair, top=top, max_tokens=max_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, greedy=greedy, beams=beams,
        length_penalty=length_penalty, samples=samples, stop=tuple(stop or ()), keep_end=keep_end, raw=raw, seed=seed,
    )  # fmt: skip
    raise typer.Exit(start(asking(GENERATE, asked, show=_shown), str(run), overrides or (), words=ctx.obj))


def chat(
    run: Run,
    overrides: Overrides = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    greedy: Greedy = False,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="another number, other answers")] = 0,
) -> None:
    """Converse with a run's model in this terminal. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C an answer.

    A model that was not taught to (roots finetune, objective.name=instruct) talks as its text does.

    \b
    roots chat runs/quickstart --temperature 0.7 --max-tokens 60
    """
    from roots_dist.generate.asked import Asked
    from roots_dist.launch.start import start
    from roots_dist.launch.verbs import CHAT, asking

    asked = Asked(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, greedy=greedy, stop=tuple(stop or ()), seed=seed,
    )  # fmt: skip
    raise typer.Exit(start(asking(CHAT, asked, hear=_next_line, show=_shown), str(run), overrides or ()))


def _shown(text: str) -> None:
    """At once, also in the middle of a line."""
    typer.echo(text, nl=False)


def _next_line() -> str:
    """What the user says next, with the usual keys to edit it; from a file no prompt is shown. Raises EOFError at the end."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401
    return input("> ")
