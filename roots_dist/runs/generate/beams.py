"""Beam search: of all texts that the model might say, the likeliest, as far as a few at a time can tell.

    logits of each beam
        --log-probabilities so far + next word, the best of all beams--> beams that go on, beams that ended

With the rules of transformers' `generate(num_beams=…, do_sample=False)`, so that an export says the same. B texts, K
beams of each, V words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from roots_dist.runs.generate.cached_decoder import CachedDecoder
from roots_dist.runs.generate.request import Answer, Request
from roots_dist.runs.generate.stops import Stops

ENDED = -1e9
"""Added to the score of a text that has ended, where nothing else is left to go on with."""


class Candidate(NamedTuple):
    score: float
    """log-probability of all its words"""
    parent: int
    """The beam that it goes on from."""
    tokens: list[int]
    over: bool


@dataclass
class Beams:
    """Of one text."""

    request: Request
    running: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    ended: list[Answer] = field(default_factory=list)
    """The best first."""
    done: bool = False

    def advance(self, candidates: list[Candidate]) -> list[int]:
        """candidates: the best of all beams' continuations, in order, more than there are beams. The parents of those
        that go on, none if nothing can be gained any more."""
        size, length = self.request.beams, len(candidates[0].tokens)
        new = [Answer(c.tokens, c.score / length**self.request.length_penalty) for c in candidates[:size] if c.over]
        self.ended = sorted(self.ended + new, key=lambda answer: -answer.score)[:size]
        alive = [c for c in candidates if not c.over][:size]
        over = [c._replace(score=c.score + ENDED) for c in candidates if c.over]
        continuing = (alive + over)[:size]
        self.running, self.scores = [c.tokens for c in continuing], [c.score for c in continuing]
        full = len(self.ended) == size
        hopeless = full and continuing[0].score / length**self.request.length_penalty <= self.ended[-1].score
        self.done = all(c.over for c in candidates) or hopeless or (full and self.request.early_stopping)
        return [c.parent for c in continuing]


def search(reader: CachedDecoder, count: int, request: Request, stops: Stops) -> list[list[Answer]]:
    """Of each of `count` texts the request.samples best answers. Collective over what `reader` spans."""
    keep = max(2, 1 + len(stops.ends)) * request.beams  # so many that enough go on, whichever ended
    beams = [Beams(request) for _ in range(count)]
    live, width = list(range(count)), 1  # texts not done, and rows of each
    logits = reader.begin()
    for position in range(request.max_tokens):
        found, vocab = None, reader.vocab
        if logits is not None:
            so_far = torch.tensor([beams[i].scores for i in live], device=logits.device)  # [B, K]
            scores = logits.log_softmax(-1).unflatten(0, (len(live), width)) + so_far.unsqueeze(-1)  # [B, K, V]
            best = scores.flatten(1).topk(keep)
            found = torch.stack([best.values.double(), best.indices.double()])
        values, indices = reader.broadcast(found, (2, len(live), keep), torch.float64)
        last = position + 1 == request.max_tokens
        rows = []
        for at, (i, scores, which) in enumerate(zip(live, values.tolist(), indices.long().tolist())):
            candidates = []
            for score, index in zip(scores, which):
                tokens = [*beams[i].running[index // vocab], index % vocab]
                candidates.append(Candidate(score, index // vocab, tokens, last or stops.reached(tokens)))
            parents = beams[i].advance(candidates)
            rows += [] if beams[i].done else [at * width + parent for parent in parents]
        live, width = [i for i in live if not beams[i].done], request.beams
        if not live:
            break
        reader.select(torch.tensor(rows))
        logits = reader.next(torch.tensor([tokens[-1:] for i in live for tokens in beams[i].running]))
    return [one.ended[: request.samples] for one in beams]
