"""The lengths of a sample of span corruption: how many tokens it reads, masks and gives back."""

from __future__ import annotations

from typing import NamedTuple


class SpanLengths(NamedTuple):
    tokens: int
    """read from the corpus"""
    inputs: int
    targets: int
    masked: int
    """tokens, in"""
    spans: int


def span_lengths(seq: int, mask_probability: float, mean_span_length: float) -> SpanLengths:
    """Read the most tokens whose corrupted text, with a sentinel for each span and the end, fills at most `seq`
    positions (Raffel et al. 2020, section 3.1.4, and its code: 512 positions take 568 tokens and give 114 targets)."""

    def of(tokens: int) -> SpanLengths:
        masked = min(max(round(tokens * mask_probability), 1), tokens - 1)
        spans = min(max(round(masked / mean_span_length), 1), masked, tokens - masked)
        return SpanLengths(tokens, tokens - masked + spans + 1, masked + spans + 1, masked, spans)

    found = of(max(2, seq - 1))  # no longer than seq, because each sentinel stands for one token or more
    while (larger := of(found.tokens + 1)).inputs <= seq:
        found = larger
    return found
