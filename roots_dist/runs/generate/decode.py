"""Generate answers to many texts at a time, in any layout, with a KV cache on every rank.

texts, shared among data ranks --> CachedDecoder --sampling or beams.py--> Answers --summed--> every rank has all
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
"""(index of a text, tokens generated so far); called after each new token, on each rank that reads the text."""


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
    """Return request.samples answers to each text, on every rank. Collective over the world.

    `start` and `together` are as in CachedDecoder. Texts that are continued need at least one token.
    """
    mesh, module = passes.mesh, passes.model.module
    between = passes.config.parallel.zero_stage == 3 and mesh.dp_cp.size > 1  # it gathers over data ranks
    together = together or between or mesh.ep.size > 1
    was_training = module.training
    module.eval()  # once, not for each token
    try:
        found = _decode_texts(passes, texts, request, stops, start, on_token, together)
    finally:
        module.train(was_training)
    return [found[i] for i in range(len(texts))] if together else _gather(mesh, found, len(texts), request)


def _decode_texts(
    passes: Passes,
    texts: Sequence[Ids],
    request: Request,
    stops: Stops,
    start: int | None,
    on_token: OnToken | None,
    together: bool,
) -> dict[int, list[Answer]]:
    """Answers to the texts of this data rank, by their indices."""
    mesh = passes.mesh
    mine = range(len(texts)) if together else range(mesh.dp_cp.rank, len(texts), mesh.dp_cp.size)
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
            found |= dict(zip(numbers, _sample(reader, numbers, before, request, stops, on_token)))
    return found


def _sample(
    reader: CachedDecoder,
    numbers: list[int],
    before: list[list[int]],
    request: Request,
    stops: Stops,
    on_token: OnToken | None,
) -> list[list[Answer]]:
    """Sample token by token. `numbers` are the indices of the texts, which key the random draws; `before` are the
    tokens that the repetition penalty counts."""
    n, how = request.samples, request.sampling
    prompts = torch.tensor(numbers).repeat_interleave(n)  # of each row
    samples = torch.arange(n).repeat(len(numbers))
    generated: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(generated)))  # rows that are not finished
    logits = reader.begin()
    if n > 1:
        rows = torch.arange(len(numbers)).repeat_interleave(n)
        reader.select(rows)
        logits = None if logits is None else logits[rows.to(logits.device)]
    for position in range(request.max_tokens):
        chosen = None
        if logits is not None:
            drawn = uniform(request.seed, prompts[live], samples[live], position) if how.temperature else None
            earlier = [before[row // n] + generated[row] for row in live] if how.repetition_penalty != 1.0 else ()
            chosen = how.choose(logits, drawn, earlier)
        new_tokens = reader.broadcast(chosen, (len(live),), torch.int64)
        for row, token in zip(live, new_tokens.tolist()):
            generated[row].append(token)
            if on_token is not None and row % n == 0:
                on_token(numbers[row // n], generated[row])
        continuing = [i for i, row in enumerate(live) if not stops.reached(generated[row])]
        if not continuing or position + 1 == request.max_tokens:
            break
        if len(continuing) < len(live):
            reader.select(torch.tensor(continuing))
            live = [live[i] for i in continuing]
        logits = reader.next(new_tokens[continuing].unsqueeze(1))
    return [[Answer(tokens) for tokens in generated[i : i + n]] for i in range(0, len(generated), n)]


def _gather(mesh: Mesh, found: dict[int, list[Answer]], count: int, request: Request) -> list[list[Answer]]:
    """Answers of all data ranks, on every rank."""
    if mesh.dp_cp.size == 1:
        return [found[i] for i in range(count)]
    tokens = torch.zeros(count, request.samples, 1 + request.max_tokens, dtype=torch.int64, device=mesh.device)
    scores = torch.zeros(count, request.samples, dtype=torch.float64, device=mesh.device)
    for i, answers in found.items():
        for k, answer in enumerate(answers):
            tokens[i, k, : 1 + len(answer.tokens)] = torch.tensor([len(answer.tokens), *answer.tokens])
            scores[i, k] = answer.score
    all_tokens, all_scores = mesh.dp_cp.sum_(tokens).tolist(), mesh.dp_cp.sum_(scores).tolist()
    return [
        [Answer(row[1 : 1 + row[0]], score) for row, score in zip(rows, values)]
        for rows, values in zip(all_tokens, all_scores)
    ]
