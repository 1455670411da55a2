"""The command line: one file per command in this folder, registered here. Each imports what it needs when it runs, so
that `roots --help` stays fast.

A user's mistake ends with one line per problem and exit code 2; anything else with its traceback.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from roots_dist.cli.chat import chat
from roots_dist.cli.doctor import doctor
from roots_dist.cli.evaluate import evaluate
from roots_dist.cli.export import export
from roots_dist.cli.finetune import finetune
from roots_dist.cli.generate import generate
from roots_dist.cli.import_model import import_model
from roots_dist.cli.init import init
from roots_dist.cli.launch import launch
from roots_dist.cli.ls import ls
from roots_dist.cli.plan import plan
from roots_dist.cli.prepare import prepare
from roots_dist.cli.report import report
from roots_dist.cli.sample import sample
from roots_dist.cli.schedule import schedule
from roots_dist.cli.train import train
from roots_dist.cli.verify import verify

app = typer.Typer(
    name="roots",
    rich_markup_mode=None,  # rich would double the time of --help
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Train language models in any tensor × sequence × pipeline × ZeRO layout, and prove it right.

    \b
    roots prepare embedded:state-of-the-union --output data/sotu
        text -> tokens
    roots train configs/quickstart.yaml
        tokens -> model, on as many processes as it needs
    roots generate runs/quickstart "My fellow citizens"
        model -> text
    roots verify configs/quickstart.yaml
        this layout computes what one process computes
    """,
)

USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""The parser's error for a command line that it does not understand."""
LAUNCHERS_OWN = re.compile(r"--local[_-]rank=\d+$")

app.command("prepare", short_help="text -> tokens (.bin/.idx, tokenizer)")(prepare)
app.command("init", short_help="a config to begin with")(init)
app.command("train", short_help="tokens -> model, in any layout")(train)
app.command("finetune", short_help="pretrained model -> model for a task")(finetune)
app.command("evaluate", short_help="held-out loss, perplexity, bits per byte")(evaluate)
app.command("generate", short_help="continue, answer, fill or label text")(generate)
app.command("chat", short_help="converse with a model")(chat)
app.command("launch", short_help="start a config on a cluster")(launch)
app.command("doctor", short_help="check a cluster before training")(doctor)
app.command("ls", short_help="list runs")(ls)
app.command("report", short_help="runs -> one HTML page that compares them")(report)
app.command("plan", short_help="memory, traffic and time of a layout")(plan)
app.command("verify", short_help="prove that a layout equals one process")(verify)
app.command("sample", short_help="show a training sample as text")(sample)
app.command("schedule", short_help="draw a pipeline schedule")(schedule)
app.command("import", short_help="Hugging Face model -> run")(import_model)
app.command("export", short_help="run -> folder for transformers, vLLM")(export)


@app.callback()
def versions(
    version: Annotated[bool, typer.Option("--version", help="versions of roots, Python, torch and DeepSpeed")] = False,
) -> None:
    """Options without a command."""


def _refuse_empty(words: Sequence[str]) -> None:
    """An empty word is a variable of the shell that is not set: as a path it would name the working directory. A
    prompt of `roots generate` may be empty."""
    from roots_dist.errors import Problem, UserError

    for at, (before, word) in enumerate(zip(["", *words], words)):
        option = before if before.startswith("--") else ""
        if re.fullmatch("--[a-z-]+=", word):
            option, word = word[:-1], ""
        if word == "" and (option or words[0] != "generate" or at < 2):
            expected, fix = "a word that is not empty (a variable that is not set?)", "give it a value, or leave it out"
            raise UserError(Problem(key=option or f"argument {at}", found="", expected=expected, fix=fix))


INVISIBLE = re.compile("^[\\s\u200b-\u200f\u2060\ufeff]|[\\s\u200b-\u200f\u2060\ufeff]$")
"""Invisible characters at either end of a word: the \\r of a script with Windows line ends, or what a web page adds."""


def _refuse_invisible(words: Sequence[str]) -> None:
    """Refuse a word that begins or ends with a character that cannot be seen: its path is not found, and no message
    shows why. A prompt may have any."""
    from roots_dist.errors import Problem, UserError

    for at, word in enumerate(words if words[:1] not in (["generate"], ["chat"]) else words[:2]):
        if odd := INVISIBLE.search(word):
            code = f"U+{ord(odd[0]):04X}"
            expected = f"a word without {code} at one of its ends"
            windows = "; or convert the script that has Windows line ends: sed -i 's/\\r$//' SCRIPT"
            fix = f"type it again as {INVISIBLE.sub('', word)}{windows if odd[0] == chr(13) else ''}"
            raise UserError(Problem(key=f"argument {at}", found=word, expected=expected, fix=fix))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `roots` and `python -m roots_dist`. deepspeed's launcher begins with --local_rank=N."""
    from roots_dist import environment
    from roots_dist.errors import UserError
    from roots_dist.logs import open_closed_streams, outliving_readers

    environment.let_threads_sleep()
    open_closed_streams()
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not LAUNCHERS_OWN.match(word)]
    try:
        with outliving_readers():
            code = _run(words)
    except UserError as error:  # of the output itself
        typer.echo(error.cli_message(), err=True)
        raise SystemExit(2) from None
    raise SystemExit(code)


def _run(words: Sequence[str]) -> int:
    """Run a command, and return its exit code."""
    from roots_dist.errors import UserError

    if words[:1] == ["--version"]:
        from roots_dist.checks.facts import version_of

        packages = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in ("torch", "deepspeed"))
        typer.echo(
            f"roots {version_of('roots_dist') or 'from a checkout'}, Python {platform.python_version()}, {packages}"
        )
        return 0
    try:
        _refuse_empty(words)
        _refuse_invisible(words)
        # a command with options starts its ranks with the same words
        code = app(words, prog_name="roots", obj=tuple(words), standalone_mode=False)
    except UserError as error:
        typer.echo(error.cli_message(), err=True)
        return 2
    except USAGE_ERROR as error:
        from roots_dist.cli.usage import usage_line

        bare = not words or (len(words) == 1 and not error.format_message().startswith(("No such", "Missing")))
        params = error.ctx.command.params if error.ctx else []
        options = [name for param in params for name in param.opts if name.startswith("--")]
        line = usage_line(error.format_message(), words, options, (error.ctx.command.help or "") if error.ctx else "")
        typer.echo(error.ctx.get_help() if bare and error.ctx else line, err=True)
        return 2
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0
