"""Sentence boundaries by punctuation, for pairs of texts that are split between sentences (learning/objectives/nsp.py).

    document --sentences--> parts whose concatenation is the document --prepare.py--> one sequence each in the .idx

For Latin, Greek and Cyrillic script. A short list covers abbreviations before a name ("Mr. Smith"); any other
abbreviation splits a sentence, which only gives a pair an odd boundary.
"""

from __future__ import annotations

import re

ABBREVIATIONS = (
    "Mr",
    "Mrs",
    "Ms",
    "Dr",
    "St",
    "Gen",
    "Gov",
    "Sen",
    "Rep",
    "Col",
    "Capt",
    "Lt",
    "Messrs",
    "Hon",
    "No",
    "vs",
)
END = re.compile(
    "".join(rf"(?<!\b{word}\.)" for word in ABBREVIATIONS)
    + r"(?<=[.!?…。！？])(?<!\b[A-Z]\.)[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-ZÀ-ÞΑ-ΩА-Я0-9])|\n\s*\n\s*"
)
"""Text between two sentences; it belongs to the first."""


def sentences(text: str) -> list[str]:
    """Parts whose concatenation is the text, none of them empty."""
    ends = [match.end() for match in END.finditer(text) if match.end() < len(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)]) if a < b] or [text]
