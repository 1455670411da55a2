"""Suggestions for words of the command line that are no overrides."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def joined(words: Sequence[str]) -> str | None:
    """The override that was written with spaces, as `train.steps 5` or `train.steps = 5`; None if it is not that."""
    if len(words) not in (2, 3) or "=" in words[0][:-1]:
        return None
    found = re.fullmatch(r"(\w+\.\w+)\s*(?:=\s*|\s+)([^\s=]+)", " ".join(words))
    return f"{found[1]}={found[2]}" if found is not None else None


def typed(text: str) -> str:
    """Text without full-width characters, which look like the others: `train.steps＝５` as train.steps=5."""
    return unicodedata.normalize("NFKC", text)
