"""When a text is over: at a token that ends it, or at a string, which may lie across the borders of tokens.

    ids so far --Stops--> over or not; text without what ended it
               --Streamed--> the part of it that can be shown already, piece by piece

Each new word costs the same, however long the text is: only as many of the last tokens are decoded as can matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from roots_dist.errors import present
from roots_dist.learning.data.tokenizer import Codec

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
    hidden: frozenset[int] = frozenset()
    """Tokens that are not shown: special ones."""
    keep_end: bool = False
    """The token that ended a text is shown."""

    def reached(self, said: Sequence[int]) -> bool:
        """Whether the last of these words ends the text. Those before it did not."""
        if said and said[-1] in self.ends:
            return True
        if not self.strings:
            return False
        longest = max(len(string.encode()) for string in self.strings)  # a token may be a single byte
        tail = present(self.codec).decode(self.shown(said[-longest - CONTEXT :]))
        return any(string in tail for string in self.strings)

    def text(self, said: Sequence[int], before: Sequence[int] = ()) -> str:
        """Of the words said after `before`, without what ended them."""
        ended = bool(said) and said[-1] in self.ends
        words = self.shown(said[:-1] if ended else said)
        lead, codec = self.shown(before[-CONTEXT:]), present(self.codec)
        start, whole = codec.decode(lead), codec.decode(lead + words)
        text = self.before_stop(whole[len(start) :] if whole.startswith(start) else codec.decode(words))
        return text + (codec.decode(said[-1:]) if ended and self.keep_end else "")

    def before_stop(self, text: str) -> str:
        """Up to the first of the strings."""
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]

    def settled(self, text: str) -> str:
        """The beginning of a text under way that no further token can change: without half a character, and without
        what may turn out to be a stop string."""
        text = text.rstrip(CUT)
        longest = max((_overlap(text, string) for string in self.strings), default=0)
        return text[: len(text) - longest]

    def shown(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i not in self.hidden]


class TextStreamer:
    """Shows one text while it is said: what is settled of it, once. As decode.Heard, it is called with all words so
    far."""

    def __init__(self, stops: Stops, before: Sequence[int], show: Callable[[str], None]):
        self._stops, self._codec, self._show = stops, present(stops.codec), show
        self._ids = stops.shown(before[-CONTEXT:])
        self._from, self._read = 0, len(self._ids)
        """Of the ids: where decoding begins, and up to where their text is known."""
        self._count = 0  # of words heard
        self._text = ""
        self._shown = 0  # characters of it

    def __call__(self, _: int, said: Sequence[int]) -> None:
        new, self._count = said[self._count :], len(said)
        self._ids += self._stops.shown([i for i in new if i not in self._stops.ends])
        known = self._codec.decode(self._ids[self._from : self._read])
        text = self._codec.decode(self._ids[self._from :])
        if len(text) > len(known) and not text.endswith(CUT):
            self._text += text[len(known) :]
            self._from, self._read = self._read, len(self._ids)
            self._say(self._stops.settled(self._stops.before_stop(self._text)))

    def finish(self, text: str) -> None:
        """text: all that was said, as Stops.text gives it; what is left of it is shown."""
        self._text = text
        self._say(text)

    def _say(self, text: str) -> None:
        new, self._shown = text[self._shown :], max(self._shown, len(text))  # before it is shown: Ctrl-C may come then
        if new:
            self._show(new)


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of the text are a beginning of the string."""
    return next((n for n in range(min(len(text), len(string)), 0, -1) if text.endswith(string[:n])), 0)
