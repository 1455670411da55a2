"""Options of `roots evaluate`: what is measured besides the loss of held-out text. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    ngram: Annotated[
        int | None,
        typer.Option(min=1, max=5, help="n-gram baselines up to this order", metavar="ORDER", show_default=False),
    ] = None
    ngram_tokens: Annotated[int, typer.Option(min=1, help="largest number of training tokens for --ngram")] = 20_000_000
    answers: Annotated[int, typer.Option(min=0, help="held-out questions to answer (instruct, seq2seq)")] = 64
    lm_eval: Annotated[
        str | None,
        typer.Option(help="tasks of EleutherAI's harness, separated by commas", metavar="TASKS", show_default=False),
    ] = None
    include_path: Annotated[
        str | None, typer.Option(help="folder of custom tasks for --lm-eval", metavar="FOLDER", show_default=False)
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="examples per task of --lm-eval", show_default=False)] = None

    json: Annotated[
        Path | None, typer.Option(help="also write the metrics here", metavar="FILE", show_default=False)
    ] = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of tasks of EleutherAI's lm-evaluation-harness."""
        return tuple(name.strip() for name in (self.lm_eval or "").split(",") if name.strip())
