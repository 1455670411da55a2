"""Special tokens of a vocabulary: ids that an objective inserts into a sample, and must never mask or draw.

    tokenizer.json and the files beside it --read_specials--> Specials --> objectives/

The files are read as JSON, without loading a tokenizer. Proofs have no tokenizer and use `synthetic_specials`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from roots_dist.config.special_tokens import (
    SpecialTokens,
    called,
    fix_of,
    ids_of,
    read_special_tokens,
    sentinels,
)
from roots_dist.errors import DataError, Problem
from roots_dist.files import read_plain, reason


@dataclass(frozen=True, eq=False)
class Specials:
    """Special token ids, and which ids are words."""

    name: str
    """Name of the tokenizer, for error messages."""
    special: np.ndarray
    """bool [vocab]: special token, or an id without a token"""
    is_continuation: np.ndarray
    """bool [vocab]: continues the word of the preceding token"""
    sentinels: tuple[int, ...] = ()
    """<extra_id_0>, <extra_id_1> …"""
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    unk: int | None = None
    end: int | None = None
    """End of a document or a text."""
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    """All that the tokenizer's files say of them: also several ends, and what stands around a text."""

    @property
    def words(self) -> np.ndarray:
        """int64: ids of ordinary tokens."""
        return np.flatnonzero(~self.special)

    def require(self, *names: str) -> None:
        """Raise DataError if the tokenizer lacks one of these tokens."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            problem = Problem(
                key="data.tokenizer",
                found=self.name,
                expected=f"a token for {called(missing)}",
                fix=fix_of(missing),
            )
            raise DataError(problem)


def read_specials(path: str | Path, vocab: int) -> Specials:
    """Read the special tokens of a tokenizer.json for `vocab` ids. Raises DataError if it cannot be read."""
    try:
        tree = json.loads(read_plain(Path(path)).decode())
        ids, model = ids_of(tree), tree["model"]
        by_default = [token["id"] for token in tree.get("added_tokens", ()) if token.get("special")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = Problem(
            key="data.tokenizer",
            found=str(path),
            expected=f"a tokenizer.json that can be read ({reason(error, path)})",
            fix="check the path",
        )
        raise DataError(problem) from error
    special = np.ones(vocab, dtype=bool)
    is_continuation = np.zeros(vocab, dtype=bool)
    is_continued = _continuation_test(model, ids)
    for token, i in ids.items():
        if i < vocab:
            special[i], is_continuation[i] = False, is_continued(token)
    tokens, ordered = read_special_tokens(path), sentinels(ids)
    for i in [*by_default, *ordered, *tokens.texts]:
        if i < vocab:
            special[i], is_continuation[i] = True, False
    return Specials(
        str(path),
        special,
        is_continuation,
        tuple(ordered),
        pad=tokens.pad,
        cls=tokens.cls,
        sep=tokens.sep,
        mask=tokens.mask,
        unk=tokens.unk,
        end=tokens.end,
        tokens=tokens,
    )


def _continuation_test(model: dict[str, Any], ids: dict[str, int]) -> Callable[[str], bool]:
    """Function that tells whether a token continues a word, depending on how the tokenizer marks word beginnings or
    continuations."""
    if model.get("type") == "WordLevel":
        return lambda token: False
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        return lambda token: token.startswith(prefix)
    mark = "▁" if any(token.startswith("▁") for token in ids) else "Ġ"
    return lambda token: not token.startswith((mark, "Ċ"))


def no_specials(vocab: int) -> Specials:
    """Special tokens of a run without a tokenizer: there are none, and every id may be a word."""
    return Specials("none", np.zeros(vocab, dtype=bool), np.zeros(vocab, dtype=bool))


def synthetic_specials(vocab: int, least_sentinels: int = 0) -> Specials:
    """Special tokens for proofs: the first ids, ten sentinels or more at the end, and every third token continues a
    word."""
    ids = np.arange(vocab)
    sentinels = tuple(range(vocab - 1, max(vocab - 1 - max(10, least_sentinels), 5), -1))
    special = (ids < 6) | (ids > vocab - 1 - len(sentinels))
    pad, cls, sep, mask, unk, end = range(6)
    return Specials(
        "none: this is a proof",
        special,
        (ids % 3 == 0) & ~special,
        sentinels,
        pad=pad,
        cls=cls,
        sep=sep,
        mask=mask,
        unk=unk,
        end=end,
        tokens=SpecialTokens(pad=pad, cls=cls, sep=sep, mask=mask, unk=unk, eos=(end,)),
    )
