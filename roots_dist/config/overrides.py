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


def number_meant(value: object, whole: bool) -> str | None:
    """The number of a text or a float that people write for one: 1k, 1,000, 3,5e-4, 10%, 1e3 steps; None if it is
    none. whole: the key takes whole numbers."""
    text = typed(str(value)).strip().lower().replace("_", "")
    if re.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+", text):
        text = text.replace(",", "")
    found = re.fullmatch(r"([-+]?(?:\d*[.,]?\d+|\d+[.,])(?:e[-+]?\d{1,3})?)\s*([k%]?)", text)
    if found is None:
        return None
    number = float(found[1].replace(",", ".")) * {"k": 1000.0, "%": 0.01, "": 1.0}[found[2]]
    if not whole:
        return f"{number:g}"
    return str(int(number)) if number == number // 1 and abs(number) < 2**53 else None


def typed(text: str) -> str:
    """Text without full-width characters, which look like the others: `train.steps＝５` as train.steps=5."""
    return unicodedata.normalize("NFKC", text)
