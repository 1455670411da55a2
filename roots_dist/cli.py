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

from roots_dist.doctor.verb import doctor
from roots_dist.errors import UserError
from roots_dist.launch.arguments import Config, Overrides, Processes, Run
from roots_dist.launch.order import launch
from roots_dist.launch.speak import chat, generate
from roots_dist.plan.verb import plan
from roots_dist.report.verb import report

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
    processes: Processes = None,
) -> None:
    """Pre-train. Bare, it starts the processes that the layout needs; torchrun, deepspeed, mpirun or srun it joins.

    Repeating the command resumes from the newest checkpoint, in another layout too. Data ranks are what tp × pp leaves.

    \b
    roots train configs/quickstart.yaml parallel.tp=1 parallel.pp=4 train.steps=50
    torchrun --nproc-per-node 8 -m roots_dist train configs/gpt2-small.yaml data.train=data/mine/train_text_document
    """
    if print_config:
        from roots_dist.config.load import to_yaml
        from roots_dist.launch.verbs import read_whole

        typer.echo(to_yaml(read_whole(config, overrides or ()).config), nl=False)
        return
    from roots_dist.launch.start import start
    from roots_dist.launch.verbs import TRAIN

    raise typer.Exit(start(TRAIN, config, overrides or (), processes))


@app.command(short_help="a model -> one for a task, in any layout")
def finetune(config: Config, overrides: Overrides = None, processes: Processes = None) -> None:
    """Go on from a run or an import with a task: classes of texts, pairs or words, instructions, text to text.

    Rows of jsonl or csv; all of the model learns, some of it, more and more of it, or low-rank adapters. The model itself
    need not be described: it is finetune.start's. Repeating the command resumes; the best checkpoint is kept.

    \b
    roots finetune configs/bert-languages.yaml finetune.strategy=lora parallel.tp=1
    """
    from roots_dist.launch.start import start
    from roots_dist.launch.verbs import FINETUNE

    raise typer.Exit(start(FINETUNE, config, overrides or (), processes))


@app.command(short_help="held-out loss, perplexity, bits per byte")
def evaluate(
    context: typer.Context,
    run: Run,
    overrides: Overrides = None,
    ngram: Annotated[
        int | None, typer.Option(min=1, max=5, help="beside it n-grams of this order", metavar="ORDER", show_default=False)
    ] = None,
    ngram_tokens: Annotated[int, typer.Option(min=1, help="training tokens that it is made from, at most")] = 20_000_000,
    answers: Annotated[int, typer.Option(min=0, help="held-out questions to answer (instruct, seq2seq)")] = 64,
    lm_eval: Annotated[
        str | None, typer.Option(help="of EleutherAI's harness: names, with commas", metavar="TASKS", show_default=False)
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="folder of tasks of your own for it", metavar="FOLDER", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples of each of its tasks", show_default=False)] = None,
) -> None:
    """Loss, perplexity and bits per byte of a run's best or newest checkpoint on all of its held-out text, or on another
    corpus; of a task accuracy, F1 and Matthews correlation, or exact answers; n-grams and other people's tasks to compare.

    One process reads what any layout wrote; for a model that needs more, ask for a layout, or start it with torchrun.

    \b
    roots evaluate runs/quickstart --ngram 3
    roots evaluate runs/quickstart parallel.tp=2 data.validation=data/mine/validation_text_document
    roots evaluate runs/quickstart --lm-eval lambada_openai,piqa --limit 200
    """
    from roots_dist.evaluate.wishes import Wishes
    from roots_dist.launch.start import start
    from roots_dist.launch.verbs import evaluation

    tasks = tuple(name.strip() for name in (lm_eval or "").split(",") if name.strip())
    wishes = Wishes(answers, ngram, ngram_tokens, tasks, include_path, limit)
    raise typer.Exit(start(evaluation(wishes), str(run), overrides or (), words=context.obj))


app.command(short_help="what a model says to a text")(generate)
app.command(short_help="talk with a model")(chat)
app.command(short_help="start a config on a cluster")(launch)
app.command(short_help="check a cluster before training")(doctor)
app.command(short_help="runs -> one HTML page that compares them")(report)
app.command(short_help="memory, traffic and time of a layout")(plan)


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
    from roots_dist.launch.verbs import read_whole
    from roots_dist.verify.verify import verify as prove

    raise typer.Exit(0 if prove(read_whole(config, overrides or ()).config, steps=steps, matrix=matrix) else 1)


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
    from roots_dist.data.shown import sample_lines
    from roots_dist.launch.verbs import read_whole

    for line in sample_lines(read_whole(config, overrides or ()).config, step):
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


@app.command(name="import", short_help="a model of Hugging Face's -> a run")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="what save_pretrained wrote, or a download")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder that becomes a run, with a checkpoint of step 0")],
    generator: Annotated[
        Path | None, typer.Option(metavar="HF_FOLDER", help="ELECTRA: of the generator", show_default=False)
    ] = None,
) -> None:
    """Make a run of a model from Hugging Face, in one process; any layout reads its slices of it from then on.

    \b
    roots import downloads/gpt2 runs/gpt2-imported
    roots import downloads/electra-small-discriminator runs/electra --generator downloads/electra-small-generator
    """
    from roots_dist.exchange.importing import import_model

    typer.echo(import_model(folder, run, generator))


@app.command(short_help="a run -> a folder for transformers, vLLM")
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="new folder for the model")],
    dtype: Annotated[str, typer.Option(help="of the tensors: float32 or bfloat16", metavar="NAME")] = "float32",
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="compare logits with transformers' [default: where it is installed, below 1e9 parameters]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a run's model as transformers (4.57 and 5) and what reads its files want it, in one process.

    Exit code 1 if the logits of the new files are not the run's.

    \b
    roots export runs/quickstart exports/quickstart
    """
    from roots_dist.exchange.exporting import checked, export_model, is_checked

    typer.echo(export_model(run, folder, dtype))
    if check or (check is None and is_checked(run)):
        said, equal = checked(run, folder, dtype)
        typer.echo(said)
        raise typer.Exit(0 if equal else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `roots` and `python -m roots_dist`. deepspeed's launcher puts --local_rank=N before the verb."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        words = [word for word in given if not LAUNCHERS_OWN.match(word)]
        app(words, prog_name="roots", obj=tuple(words))  # a verb with options starts its ranks with the same words
    except UserError as error:
        typer.echo(error.complaint(), err=True)
        raise SystemExit(2) from None
