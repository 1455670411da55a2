"""When a text is over: at a token that ends it, or at a string, which may lie across the borders of tokens.

    ids so far --Stops--> over or not; text without what ended it; the part of it that can be shown already
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roots_dist.data.tokenizer import Codec

CUT = "�"
"""How the middle of a character that takes several tokens is decoded."""
CONTEXT = 8
"""Tokens before a text that are decoded with it: a first word has its space only after another."""


@dataclass(frozen=True)
class Stops:
    """codec: for strings and texts; None: ids alone matter."""

    ends: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    codec: Codec | None = None

    def reached(self, said: Sequence[int]) -> bool:
        if said and said[-1] in self.ends:
            return True
        if not self.strings:
            return False
        text = self.codec.decode(said)
        return any(string in text for string in self.strings)

    def text(self, said: Sequence[int], before: Sequence[int] = ()) -> str:
        """Of the words said after `before`, without what ended them."""
        said = list(said[:-1] if said and said[-1] in self.ends else said)
        before = list(before[-CONTEXT:])
        lead, whole = self.codec.decode(before), self.codec.decode(before + said)
        text = whole[len(lead) :] if whole.startswith(lead) else self.codec.decode(said)
        found = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(found)] if found else text

    def settled(self, text: str) -> str:
        """The beginning of a text under way that no further token can change: without half a character, and without what
        may turn out to be a stop string."""
        text = text.rstrip(CUT)
        longest = max((_overlap(text, string) for string in self.strings), default=0)
        return text[: len(text) - longest]


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of the text are a beginning of the string."""
    return next((n for n in range(min(len(text), len(string)), 0, -1) if text.endswith(string[:n])), 0)
