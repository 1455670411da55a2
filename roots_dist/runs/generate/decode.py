"""Texts in, what the model says to them out: many at a time, in any layout, keys and values kept on every rank.

texts --each data rank takes some, in batches--> Reader --sampled or beams.py--> Answers --summed--> every rank has all
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from roots_dist.assembly.passes import Passes
from roots_dist.runs.generate.beams import search
from roots_dist.runs.generate.cached_decoder import CachedDecoder
from roots_dist.runs.generate.request import Answer, Request
from roots_dist.runs.generate.sampling import uniform
from roots_dist.runs.generate.stops import Stops
from roots_dist.world.mesh import Mesh

Ids = Sequence[int]
OnToken = Callable[[int, Ids], None]
"""(number of a text, what has been said to it so far), called on each rank that reads it, for each new word."""


def decode(
    passes: Passes,
    texts: Sequence[Ids],
    request: Request,
    stops: Stops = Stops(),
    *,
    start: int | None = None,
    on_token: OnToken | None = None,
    together: bool = False,
) -> list[list[Answer]]:
    """Of each text its answers, request.samples of them, on every rank. Collective over the world.

    start, together: as of Reader. Texts that are gone on with need at least one token.
    """
    mesh, module = passes.mesh, passes.model.module
    learning = module.training
    module.eval()  # once, not for each word
    try:
        found = _decoded(passes, texts, request, stops, start, on_token, together)
    finally:
        module.train(learning)
    return [found[i] for i in range(len(texts))] if together else _shared(mesh, found, len(texts), request)


def _decoded(
    passes: Passes,
    texts: Sequence[Ids],
    request: Request,
    stops: Stops,
    start: int | None,
    on_token: OnToken | None,
    together: bool,
) -> dict[int, list[Answer]]:
    """The texts of this data rank, by their numbers."""
    mesh = passes.mesh
    mine = range(len(texts)) if together else range(mesh.dp.rank, len(texts), mesh.dp.size)
    at_once = max(1, request.rows // max(request.samples, request.beams))
    by_length = sorted(mine, key=lambda i: len(texts[i]))  # neighbours need little padding
    found: dict[int, list[Answer]] = {}
    for first in range(0, len(by_length), at_once):
        numbers = by_length[first : first + at_once]
        reader = CachedDecoder(passes, [texts[i] for i in numbers], start, together=together)
        if request.beams:
            best = search(reader, len(numbers), request, stops)
            found |= dict(zip(numbers, best))
        else:
            before = [list(texts[i]) if start is None else [start] for i in numbers]
            found |= dict(zip(numbers, _sampled(reader, numbers, before, request, stops, on_token)))
    return found


def _sampled(
    reader: CachedDecoder,
    numbers: list[int],
    before: list[list[int]],
    request: Request,
    stops: Stops,
    on_token: OnToken | None,
) -> list[list[Answer]]:
    """Word by word. numbers: of the texts, which key what is drawn; before: what the penalty on repetition counts
    in."""
    n, how = request.samples, request.sampling
    prompts = torch.tensor(numbers).repeat_interleave(n)  # of each row
    samples = torch.arange(n).repeat(len(numbers))
    said: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(said)))  # rows that still speak
    logits = reader.begin()
    if n > 1:
        rows = torch.arange(len(numbers)).repeat_interleave(n)
        reader.select(rows)
        logits = None if logits is None else logits[rows.to(logits.device)]
    for position in range(request.max_tokens):
        chosen = None
        if logits is not None:
            drawn = uniform(request.seed, prompts[live], samples[live], position) if how.temperature else None
            earlier = [before[row // n] + said[row] for row in live] if how.repetition_penalty != 1.0 else ()
            chosen = how.choose(logits, drawn, earlier)
        words = reader.broadcast(chosen, (len(live),), torch.int64)
        for row, word in zip(live, words.tolist()):
            said[row].append(word)
            if on_token is not None and row % n == 0:
                on_token(numbers[row // n], said[row])
        continuing = [i for i, row in enumerate(live) if not stops.reached(said[row])]
        if not continuing or position + 1 == request.max_tokens:
            break
        if len(continuing) < len(live):
            reader.select(torch.tensor(continuing))
            live = [live[i] for i in continuing]
        logits = reader.next(words[continuing].unsqueeze(1))
    return [[Answer(tokens) for tokens in said[i : i + n]] for i in range(0, len(said), n)]


def _shared(mesh: Mesh, found: dict[int, list[Answer]], count: int, request: Request) -> list[list[Answer]]:
    """What each data rank found, on every rank."""
    if mesh.dp.size == 1:
        return [found[i] for i in range(count)]
    tokens = torch.zeros(count, request.samples, 1 + request.max_tokens, dtype=torch.int64, device=mesh.device)
    scores = torch.zeros(count, request.samples, dtype=torch.float64, device=mesh.device)
    for i, answers in found.items():
        for k, answer in enumerate(answers):
            tokens[i, k, : 1 + len(answer.tokens)] = torch.tensor([len(answer.tokens), *answer.tokens])
            scores[i, k] = answer.score
    all_tokens, all_scores = mesh.dp.sum_(tokens).tolist(), mesh.dp.sum_(scores).tolist()
    return [
        [Answer(row[1 : 1 + row[0]], score) for row, score in zip(rows, values)]
        for rows, values in zip(all_tokens, all_scores)
    ]
