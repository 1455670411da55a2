"""Where sentences begin, by punctuation: for pairs of texts that are cut between two (learning/objectives/nsp.py).

    document --sentences--> pieces of it that add up to it --prepare.py--> one sequence each in the .idx

For Latin, Greek and Cyrillic script. An abbreviation before a name ("Mr. Smith") is one of a short list; others cut a
sentence in two, which costs a pair a strange border and nothing else.
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
"""What stands between two sentences: it belongs to the first."""


def sentences(text: str) -> list[str]:
    """Pieces that add up to the text, none of them empty."""
    ends = [match.end() for match in END.finditer(text) if match.end() < len(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)]) if a < b] or [text]
