"""Beam search: approximate the likeliest of all texts that the model can write, with K hypotheses at a time.

    logits of each beam --sum of log-probabilities + next token, the best of all beams--> open beams, finished beams

The rules are those of transformers' `generate(num_beams=…, do_sample=False)`, so that an export writes the same text. B
texts, K beams of each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from roots_dist.runs.generate.cached_decoder import CachedDecoder
from roots_dist.runs.generate.request import Answer, Request
from roots_dist.runs.generate.stops import Stops

ENDED = -1e9
"""Added to the score of a finished hypothesis that fills up the beams when no open one is left."""


class Candidate(NamedTuple):
    score: float
    """Log-probability of all its tokens."""
    parent: int
    """Index of the beam that it continues."""
    tokens: list[int]
    is_finished: bool


@dataclass
class Beams:
    """Beams of one text."""

    request: Request
    running: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    ended: list[Answer] = field(default_factory=list)
    """Finished hypotheses, best first."""
    done: bool = False

    def advance(self, candidates: list[Candidate]) -> list[int]:
        """Advance by one token. `candidates` are the best continuations of all beams, in order, more than there are
        beams. Returns the parents of the beams that continue; none if the result can no longer improve."""
        size, length = self.request.beams, len(candidates[0].tokens)
        new = [
            Answer(c.tokens, c.score / length**self.request.length_penalty) for c in candidates[:size] if c.is_finished
        ]
        self.ended = sorted(self.ended + new, key=lambda answer: -answer.score)[:size]
        alive = [c for c in candidates if not c.is_finished][:size]
        finished = [c._replace(score=c.score + ENDED) for c in candidates if c.is_finished]
        continuing = (alive + finished)[:size]
        self.running, self.scores = [c.tokens for c in continuing], [c.score for c in continuing]
        full = len(self.ended) == size
        hopeless = full and continuing[0].score / length**self.request.length_penalty <= self.ended[-1].score
        self.done = all(c.is_finished for c in candidates) or hopeless or (full and self.request.early_stopping)
        return [c.parent for c in continuing]


def search(reader: CachedDecoder, count: int, request: Request, stops: Stops) -> list[list[Answer]]:
    """Return the request.samples best answers to each of `count` texts. Collective over the ranks of `reader`."""
    keep = max(2, 1 + len(stops.ends)) * request.beams  # enough that K open ones remain whichever end
    beams = [Beams(request) for _ in range(count)]
    live, width = list(range(count)), 1  # unfinished texts, and rows of each
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
