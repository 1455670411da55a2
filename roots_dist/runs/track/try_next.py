"""Suggestions for a finished run: commands that can be pasted, with words of the run's own text.

config, folder --first_words--> `roots generate 'my runs/a' "Fellow-citizens of the Senate"`
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from roots_dist.config.extensions import KEY, split
from roots_dist.config.load import CONFIG_FILE
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import read_special_tokens
from roots_dist.errors import UserError
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.data.tasks import open_examples
from roots_dist.learning.data.tokenizer import load_codec

WORDS, TOKENS = 6, 64
"""Words of a prompt, and tokens that are read for them."""
BARE = re.compile(r"[\w .,;:?'<>/-]*(\[\w+\][\w .,;:?'<>/-]*)?")
"""Text that a shell leaves as it is between double quotes."""
PLAIN = re.compile(r"[\w./][\w./-]*")
"""A path that YAML reads as it stands in a list."""


def next_commands(config: Config, folder: Path) -> Iterator[str]:
    """Commands for a run that has finished, the most interesting one first."""
    roots = command()
    if config.data.tokenizer:
        words = first_words(config) or "a text"
        asked = objective_of(config).prompt.format(
            run=shlex.quote(str(folder)),
            text=_quoted(words),
            masked=_quoted(_with_hole(words, _mask(config.data.tokenizer))),
            hollow=_quoted(_with_hole(words, "<extra_id_0>")),
        )
        pair = f" --pair {_quoted(words)}" if config.finetune.pair_column else ""
        yield f"{roots} {asked}{pair}{_extensions(config)}"
    yield f"{roots} verify {shlex.quote(str(folder / CONFIG_FILE))}"


def _extensions(config: Config) -> str:
    """The files of the run's extensions, as a command on its folder has to name them."""
    files = [split(entry)[0] for entry in config.advanced.extensions]
    written = ", ".join(file if PLAIN.fullmatch(file) else json.dumps(file) for file in files)
    return f" {shlex.quote(f'{KEY}=[{written}]')}" if files else ""


def first_words(config: Config) -> str | None:
    """The first words of the held-out text, or of the training text; None if it cannot be read any more."""
    for source in (*config.data.validation, *config.data.train):
        try:
            ids = _first_tokens(source.path, config)
            lines = load_codec(str(config.data.tokenizer)).decode(ids.tolist()).split("\n")
        except (UserError, OSError, IndexError):
            continue
        words = max(lines[:3], key=len).split()[:WORDS]
        if len(words) > 1:
            return " ".join(word.replace("\N{REPLACEMENT CHARACTER}", "") for word in words).rstrip(" .,;:")
    return None


def _first_tokens(path: str, config: Config) -> np.ndarray:
    if objective_of(config).rows:
        return open_examples(path, config).rows[0].first[:TOKENS]
    return Corpus.open(path).document(0)[:TOKENS]


def _mask(tokenizer: str) -> str:
    try:
        found = read_special_tokens(tokenizer)
    except UserError:  # it may be gone by now
        return "[MASK]"
    return "[MASK]" if found.mask is None else found.text(found.mask)


def _with_hole(words: str, hole: str) -> str:
    """The words with the hole in place of the last but one."""
    parts = words.split()
    parts[-2:-1] = [hole]
    return " ".join(parts)


def _quoted(text: str) -> str:
    return f'"{text}"' if BARE.fullmatch(text) else shlex.quote(text)


def command() -> str:
    """The command that calls `roots` here: its name if the shell finds it, else a path."""
    if shutil.which("roots"):
        return "roots"
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    beside = python.with_name("roots")
    return shlex.quote(str(beside)) if beside.exists() else f"{shlex.quote(str(python))} -m roots_dist"
