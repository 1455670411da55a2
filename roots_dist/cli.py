"""The verbs. Each is a few lines that import what they need inside, so that `roots --help` stays quick.

A mistake of the user ends with one line for each problem and exit code 2; anything else with its traceback.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from roots_dist.errors import UserError

app = typer.Typer(
    name="roots",
    add_completion=False,
    rich_markup_mode=None,  # rich would double the time of --help
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Train language models in any tensor × sequence × pipeline × ZeRO layout, and prove it right.

    \b
    roots prepare embedded:state-of-the-union --output data/sotu     text -> tokens
    roots train configs/quickstart.yaml                              tokens -> model, on as many processes as it needs
    roots generate runs/quickstart "My fellow citizens"              model -> text
    roots verify configs/quickstart.yaml                             this layout computes what one process computes
    """,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, as in configs/")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value ...]", help="replace values of the file: optim.lr=1e-3", show_default=False
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run (track.folder of its config)")]
LAUNCHERS_OWN = re.compile(r"--local[_-]rank=\d+$")


@app.command(short_help="text -> tokens (.bin/.idx, tokenizer)")
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="txt, jsonl (.gz, .zst), parquet; folder, glob or embedded:NAME"),
    ],
    output: Annotated[Path, typer.Option(help="folder for train/validation .bin/.idx, tokenizer.json, manifest.json")],
    text_key: Annotated[str, typer.Option(help="field that holds the text, in jsonl and parquet")] = "text",
    vocab: Annotated[int, typer.Option(help="entries of the tokenizer to be trained")] = 4096,
    kind: Annotated[
        str, typer.Option(help="of tokenizer: bpe, wordpiece (BERT), unigram (T5) or words", metavar="NAME")
    ] = "bpe",
    min_count: Annotated[int, typer.Option(min=1, help="words: rarer ones are <unk>")] = 2,
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="one sequence per sentence (next-sentence prediction)")
    ] = False,
    pre_tokenizer: Annotated[
        str, typer.Option(help="how text is cut into words: gpt2 or bloom", metavar="NAME")
    ] = "gpt2",
    tokenizer: Annotated[Path | None, typer.Option(help="use this tokenizer.json instead of training one")] = None,
    end_of_document: Annotated[
        str | None, typer.Option(help="its token that ends a document, if it is not a usual one", metavar="TOKEN")
    ] = None,
    validation: Annotated[float, typer.Option(help="share of documents held out")] = 0.05,
    seed: Annotated[int, typer.Option(help="another number, other documents held out")] = 1234,
    workers: Annotated[int | None, typer.Option(help="processes (default: one per core)", show_default=False)] = None,
    on_error: Annotated[
        str, typer.Option(help="at a document that cannot be read: stop or skip", metavar="WORD")
    ] = "stop",
) -> None:
    """Turn text into tokens: train or take a tokenizer, write Megatron's .bin/.idx, one sequence per document.

    Repeating it is free if nothing changed; after an interruption it starts clean.

    \b
    roots prepare books/*.jsonl.gz --text-key body --output data/books --vocab 16384
    """
    from roots_dist.data.prepare import prepare as run
    from roots_dist.terminal import bar

    with bar() as progress:
        manifest = run(
            inputs,
            output,
            text_key=text_key,
            vocab=vocab,
            kind=kind,
            pre_tokenizer=pre_tokenizer,
            min_count=min_count,
            split_sentences=split_sentences,
            tokenizer=tokenizer,
            end_of_document=end_of_document,
            validation=validation,
            seed=seed,
            workers=workers,
            on_error=on_error,  # type: ignore[arg-type]  # prepare refuses other words
            progress=progress,
        )
    typer.echo(f"{output}\n{manifest.summary()}")


@app.command(short_help="tokens -> model, in any layout")
def train(
    config: Config,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="show the whole resolved config, train nothing")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="processes to start here (default: tp × pp, or one per GPU)", show_default=False),
    ] = None,
) -> None:
    """Pre-train. Bare, it starts the processes that the layout needs; torchrun, deepspeed, mpirun or srun it joins.

    Repeating the command resumes from the newest checkpoint, in another layout too. Data ranks are what tp × pp leaves.

    \b
    roots train configs/quickstart.yaml parallel.tp=1 parallel.pp=4 train.steps=50
    torchrun --nproc-per-node 8 -m roots_dist train configs/gpt2-small.yaml data.train=data/mine/train_text_document
    """
    if print_config:
        from roots_dist.config.load import load, to_yaml

        typer.echo(to_yaml(load(config, overrides or ())), nl=False)
        return
    from roots_dist.launch.start import start
    from roots_dist.launch.verbs import TRAIN

    raise typer.Exit(start(TRAIN, config, overrides or (), processes))


@app.command(short_help="held-out loss, perplexity, bits per byte")
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Loss, perplexity and bits per byte of a run's newest checkpoint on all of its held-out text, or on another corpus.

    One process reads what any layout wrote; for a model that needs more, ask for a layout, or start it with torchrun.

    \b
    roots evaluate runs/quickstart train.eval_sequences=512
    roots evaluate runs/quickstart parallel.tp=2 data.validation=data/mine/validation_text_document
    """
    from roots_dist.launch.start import start
    from roots_dist.launch.verbs import EVALUATE

    raise typer.Exit(start(EVALUATE, str(run), overrides or ()))


@app.command(short_help="continue a text")
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="what the text begins with")],
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to add")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="below 1 safer, above 1 wilder; 0 is greedy")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="choose among the k likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=1e-6, max=1.0, help="choose among the fewest tokens of this probability")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token")] = False,
    seed: Annotated[int, typer.Option(help="another number, another text")] = 0,
) -> None:
    """Continue a text with a run's newest checkpoint, whatever layout wrote it.

    \b
    roots generate runs/quickstart "The state of the Union" --max-tokens 200 --top-p 0.9
    """
    from roots_dist.generate.generate import generate as write
    from roots_dist.generate.sampling import Sampling

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p)
    lead = [prompt]  # shown with the first words, when nothing can be refused any more

    def show(text: str) -> None:
        typer.echo((lead.pop() if lead else "") + text, nl=False)

    write(run, prompt, max_tokens=max_tokens, sampling=sampling, seed=seed, show=show)
    typer.echo()


@app.command(short_help="prove a layout equal to one process")
def verify(
    config: Config,
    overrides: Overrides = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="the whole grid of layouts instead of the config's own")
    ] = False,
    steps: Annotated[int, typer.Option(min=2, help="steps of training to compare")] = 3,
) -> None:
    """Prove on this machine's CPU that a layout computes what one process computes: loss, gradients, weights, moments.

    The model is shrunk, its features and degrees are kept (up to 8 processes). Exit code 1 if anything differs.

    \b
    roots verify configs/bloom-176b.yaml
    """
    from roots_dist.config.load import load
    from roots_dist.verify.verify import verify as prove

    raise typer.Exit(0 if prove(load(config, overrides or ()), steps=steps, matrix=matrix) else 1)


@app.command(short_help="show what is learned from")
def sample(
    config: Config,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="of the run, counted from 0")] = 0,
) -> None:
    """Show a sample of a training step in words: what the model reads, and what it is to say. Trains nothing.

    \b
    roots sample configs/t5-quickstart.yaml --step 3
    """
    from roots_dist.config.load import load
    from roots_dist.data.shown import sample_lines

    for line in sample_lines(load(config, overrides or ()), step):
        typer.echo(line)


@app.command(short_help="draw a pipeline schedule")
def schedule(
    name: Annotated[str, typer.Argument(metavar="NAME", help="gpipe, 1f1b, interleaved or zb-h1")],
    ranks: Annotated[int, typer.Option(min=1, help="pipeline ranks")],
    microbatches: Annotated[int, typer.Option(min=1, help="microbatches of a step")],
    chunks: Annotated[int, typer.Option(min=1, help="stages per rank")] = 1,
    png: Annotated[Path | None, typer.Option(help="write the picture here")] = None,
) -> None:
    """Draw a pipeline schedule, with its bubble and the activations that each rank holds.

    \b
    roots schedule zb-h1 --ranks 4 --microbatches 8
    """
    from roots_dist.pipeline.draw import describe

    typer.echo(describe(name, ranks, microbatches, chunks, png))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `roots` and `python -m roots_dist`. deepspeed's launcher puts --local_rank=N before the verb."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        words = [word for word in given if not LAUNCHERS_OWN.match(word)]
        app(words, prog_name="roots", obj=tuple(words))  # a verb with options starts its ranks with the same words
    except UserError as error:
        typer.echo(error.complaint(), err=True)
        raise SystemExit(2) from None
