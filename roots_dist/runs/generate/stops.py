"""Stop conditions: a token that ends a text, or a string, which may span several tokens.

    ids so far --Stops--> finished or not; text without what ended it
               --TextStreamer--> the part that can be shown already, incrementally

Each new token costs the same however long the text is: only the last tokens that can matter are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from roots_dist.errors import present
from roots_dist.learning.data.tokenizer import Codec

CUT = "�"
"""Text that an incomplete multi-token character decodes to."""
CONTEXT = 8
"""Number of tokens before a text that are decoded with it: the first word has its space only after another token."""


@dataclass(frozen=True)
class Stops:
    """Stop conditions; without a codec only ids count."""

    ends: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    codec: Codec | None = None
    hidden: frozenset[int] = frozenset()
    """Tokens that are not shown: special ones."""
    keep_end: bool = False
    """True if the token that ended a text is shown."""

    def reached(self, tokens: Sequence[int]) -> bool:
        """True if the last of these tokens ends the text. The earlier ones did not."""
        if tokens and tokens[-1] in self.ends:
            return True
        if not self.strings:
            return False
        longest = max(len(string.encode()) for string in self.strings)  # a token may be a single byte
        tail = present(self.codec).decode(self.shown(tokens[-longest - CONTEXT :]))
        return any(string in tail for string in self.strings)

    def text(self, tokens: Sequence[int], before: Sequence[int] = ()) -> str:
        """Text of the tokens generated after `before`, without what ended it."""
        ended = bool(tokens) and tokens[-1] in self.ends
        kept = self.shown(tokens[:-1] if ended else tokens)
        lead, codec = self.shown(before[-CONTEXT:]), present(self.codec)
        start, whole = codec.decode(lead), codec.decode(lead + kept)
        text = self.before_stop(whole[len(start) :] if whole.startswith(start) else codec.decode(kept))
        return text + (codec.decode(tokens[-1:]) if ended and self.keep_end else "")

    def before_stop(self, text: str) -> str:
        """The text up to the first stop string."""
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]

    def settled(self, text: str) -> str:
        """Beginning of an unfinished text that no further token can change: without an incomplete character, and
        without what may become a stop string."""
        text = text.rstrip(CUT)
        longest = max((_overlap(text, string) for string in self.strings), default=0)
        return text[: len(text) - longest]

    def shown(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i not in self.hidden]


class TextStreamer:
    """Show one text while it is generated, each final part once. It is called with all tokens so far
    (decode.OnToken)."""

    def __init__(self, stops: Stops, before: Sequence[int], show: Callable[[str], None]):
        self._stops, self._codec, self._show = stops, present(stops.codec), show
        self._ids = stops.shown(before[-CONTEXT:])
        self._from, self._read = 0, len(self._ids)
        """Indices into the ids: where decoding starts, and up to where their text is known."""
        self._count = 0  # of tokens seen
        self._text = ""
        self._shown = 0  # characters of it

    def __call__(self, _: int, tokens: Sequence[int]) -> None:
        new, self._count = tokens[self._count :], len(tokens)
        self._ids += self._stops.shown([i for i in new if i not in self._stops.ends])
        known = self._codec.decode(self._ids[self._from : self._read])
        text = self._codec.decode(self._ids[self._from :])
        if len(text) > len(known) and not text.endswith(CUT):
            self._text += text[len(known) :]
            self._from, self._read = self._read, len(self._ids)
            self._show_new(self._stops.settled(self._stops.before_stop(self._text)))

    def finish(self, text: str) -> None:
        """Show the rest of `text`, the complete answer as Stops.text returns it."""
        self._text = text
        self._show_new(text)

    def _show_new(self, text: str) -> None:
        new, self._shown = (
            text[self._shown :],
            max(self._shown, len(text)),
        )  # before showing, because Ctrl-C may come then
        if new:
            self._show(new)


def _overlap(text: str, string: str) -> int:
    """Number of characters at the end of the text that are a beginning of the string."""
    return next((n for n in range(min(len(text), len(string)), 0, -1) if text.endswith(string[:n])), 0)
