"""`roots prepare`: text to tokens on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from roots_dist.cli.options import with_options


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of learning/data/prepare.py, under the same names."""

    text_key: Annotated[str, typer.Option(help="field that holds the text, in jsonl and parquet; a.b is b of a")] = (
        "text"
    )
    vocab: Annotated[int, typer.Option(help="vocabulary size of a trained tokenizer")] = 4096
    kind: Annotated[
        str, typer.Option(help="kind of tokenizer: bpe, wordpiece (BERT), unigram (T5) or words", metavar="NAME")
    ] = "bpe"
    min_count: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="kind words: rarer words become <unk>")] = 2
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="one sequence per sentence (next-sentence prediction)")
    ] = False
    pre_tokenizer: Annotated[str, typer.Option(help="how text is split into words: gpt2 or bloom", metavar="NAME")] = (
        "gpt2"
    )
    tokenizer: Annotated[Path | None, typer.Option(help="use this tokenizer.json instead of training one")] = None
    end_of_document: Annotated[
        str | None, typer.Option(help="its token that ends a document, if not its eos", metavar="TOKEN")
    ] = None
    begin_of_document: Annotated[
        bool, typer.Option("--begin-of-document", help="begin each document with the tokenizer's bos")
    ] = False
    validation: Annotated[float, typer.Option(help="fraction of documents to hold out")] = 0.05
    seed: Annotated[int, typer.Option(help="random seed of the held-out split")] = 1234
    workers: Annotated[
        int | None, typer.Option(max=4096, help="processes (default: one per core)", show_default=False)
    ] = None
    extension: Annotated[
        tuple[str, ...],
        typer.Option(help="Python file with readers of other kinds of files", metavar="FILE", show_default=False),
    ] = ()
    on_error: Annotated[str, typer.Option(help="on an unreadable document: stop or skip", metavar="WORD")] = "stop"


@with_options
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="txt, jsonl (.gz, .zst), parquet; folder, glob or embedded:NAME"),
    ],
    output: Annotated[Path, typer.Option(help="folder for train/validation .bin/.idx, tokenizer.json, manifest.json")],
    options: PrepareOptions,
) -> None:
    """Tokenize text: train or load a tokenizer, write Megatron's .bin/.idx, one sequence per document.

    Repeating it does nothing if nothing has changed; after an interruption it starts clean.

    \b
    roots prepare books/*.jsonl.gz --text-key body \\
        --output data/books --vocab 16384
    """
    from roots_dist.cli.terminal import progress_bar
    from roots_dist.learning.data.prepare import prepare as run

    with progress_bar() as progress:
        manifest = run(inputs, output, **vars(options), progress=progress)
    typer.echo(f"{output}\n{manifest.summary()}")
