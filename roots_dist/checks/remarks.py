"""Remarks on a config that can run, and does something else than its writer may think: one line each, when it begins.

    Config + layout + words of the tokenizer --remarks--> lines behind the banner

They are no problems, because one file serves any layout, a trial in one process too.
"""

from __future__ import annotations

from collections.abc import Iterator

from roots_dist.accounting.sizes import parameters
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.schedule.schedules import DEFAULT


def remarks(config: Config, layout: Layout, words: int | None) -> Iterator[str]:
    """words: number of ids of the tokenizer, or of the corpora where there is none; None: not known."""
    yield from _unread_rows(config, words)
    parallel = config.parallel
    if layout.pp == 1 and parallel.schedule != DEFAULT:
        yield f"parallel.schedule={parallel.schedule} gains nothing with parallel.pp=1: no rank waits for another one"
    if parallel.zero_stage > 1 and layout.dp * layout.cp == 1:
        yield f"parallel.zero_stage={parallel.zero_stage} shards nothing: there is one data rank"


def _unread_rows(config: Config, words: int | None) -> Iterator[str]:
    """A vocabulary that is larger than the tokenizer's by more than padding. That of a released model is what it is."""
    vocab, multiple = config.model.vocab, config.advanced.vocab_multiple
    if words is None or config.finetune.init_from is not None or vocab <= -(-words // multiple) * multiple:
        return
    fewer = parameters(config.changed({"model.vocab": words}))
    yield (
        f"model.vocab = {vocab:,} is more than the {words:,} words of the tokenizer: model.vocab={words} makes "
        f"{fewer:,} parameters of {parameters(config):,}"
    )
