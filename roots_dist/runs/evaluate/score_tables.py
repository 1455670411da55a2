"""Tables of `roots evaluate` for a terminal. Computes nothing but shares.

Score, Answers, NgramBaselines --> rich tables
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from roots_dist.errors import present
from roots_dist.runs.evaluate.answers import Answers
from roots_dist.runs.evaluate.baseline import NgramBaselines
from roots_dist.runs.evaluate.held_out import Score
from roots_dist.runs.evaluate.task_metrics import class_scores
from roots_dist.storage.checkpoint.object_store import Place

MOST_CLASSES = 12
"""Largest number of classes in a confusion table: a wider one is unreadable."""
SHOWN = 3
"""Answers"""
WIDE = 1000
"""Width in columns: a table takes what it needs, and nothing is cut where there is no terminal."""
LONGEST = 160
"""Largest number of characters shown of a text."""


def show(*what: object) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False, width=WIDE)
    for one in what:
        console.print(one)


def plain(*columns: str) -> Table:
    """Table without lines; the first column is text, the others are numbers."""
    table = Table(box=None, pad_edge=False, show_header=bool(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i and columns else "left")
    return table


def score_table(checkpoint: Place, sequences: int, found: Score) -> Table:
    table = plain()
    table.add_row("checkpoint", str(checkpoint))
    single = next(iter(found.terms.values())) if len(found.terms) == 1 and not found.perplexity_term else None
    scored = "token" if found.perplexity_term else "pair" if single and found.confusion is None else "label"
    if found.perplexity_term:
        table.add_row("tokens", f"{found.targets:,} in {sequences:,} sequences")
    else:
        table.add_row(f"{scored}s", f"{found.targets:,} in {sequences:,} examples")
    if found.log_likelihood is not None:
        table.add_row("log-likelihood", f"{found.log_likelihood:,.1f} nats")
    table.add_row("loss", f"{found.loss:.4f} nats per {scored}")
    for name, sums in found.terms.items() if len(found.terms) > 1 else ():
        table.add_row(f"  {name}", f"{sums.mean:.4f} nats, {sums.accuracy:.1%} right of {sums.count:,}")
    if found.perplexity is not None:
        table.add_row("perplexity", f"{found.perplexity:.2f}")
    if found.bits_per_byte is not None:
        table.add_row("bits per byte", f"{found.bits_per_byte:.4f}")
    if single is not None:
        table.add_row("accuracy", f"{single.accuracy:.4f}")
    if found.confusion is not None:
        for name, value in found.metrics().items():
            kind, _, label = name.partition("/validation")
            if kind in ("f1", "mcc"):
                table.add_row(
                    {"f1": "F1" + (f" of {label[1:]}" if label else ", mean"), "mcc": "MCC"}[kind], f"{value:.4f}"
                )
    return table


def sources_table(found: Score) -> Table:
    """A row per source, and one for all together."""
    more = ["perplexity"] * bool(found.perplexity_term) + ["bits per byte"] * bool(found.bits_per_byte)
    table = plain("", "tokens" if found.perplexity_term else "labels", "loss", *more)
    for name, one in [*found.sources.items(), ("all", found)]:
        row = [name, f"{one.targets:,}", f"{one.loss:.4f}"]
        row += [f"{one.perplexity:.2f}"] if found.perplexity_term else []
        row += ["-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"] if found.bits_per_byte else []
        table.add_row(*row)
    return table


def classes_tables(found: Score) -> list[Table]:
    """Precision, recall and F1 of each class, and the confusion table if there are few classes."""
    table = plain("label", "precision", "recall", "F1", "examples")
    counts = present(found.confusion)
    for label, one in zip(found.labels, class_scores(counts)):
        table.add_row(label, f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}", f"{one.support:,}")
    if len(found.labels) > MOST_CLASSES:
        return [table]
    confusion = plain("label \\ guess", *found.labels)
    for label, row in zip(found.labels, counts.tolist()):
        confusion.add_row(label, *(f"{count:,}" for count in row))
    return [table, confusion]


def answers_lines(found: Answers) -> list[str]:
    """Exact match, and some examples: question | expected | answer."""
    shown = [
        " | ".join((_end(one.question), _beginning(one.expected), _beginning(one.answer)))
        for one in found.questions[:SHOWN]
    ]
    return [
        f"exact match  {found.exact_match:.4f} of {len(found.questions):,} greedy answers",
        "question | expected | answer",
        *shown,
    ]


def _end(text: str) -> str:
    return text if len(text) <= LONGEST else "… " + text[-LONGEST:]


def _beginning(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def ngram_table(found: NgramBaselines, model: Score) -> list[object]:
    """A row per baseline, then the model."""
    table = plain("model", "loss", "perplexity", *(["bits per byte"] if model.bits_per_byte else []))
    for name, loss in [*found.orders, ("this run", model.loss)]:
        row = [name, f"{loss:.4f}", f"{math.exp(loss):.2f}"]
        row += [f"{loss / math.log(2) / present(model.bytes_per_token):.4f}"] if model.bits_per_byte else []
        table.add_row(*row)
    part = "" if found.used == found.available else f" of {found.available:,}"
    return [table, f"n-grams: modified Kneser-Ney, from {found.used:,}{part} training tokens"]


def harness_table(results: Mapping[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(dict(results)), make_table(dict(results), "groups") if results.get("groups") else ""]
    return "\n".join(part.strip() for part in tables if part)
