"""Keep the ties between stages when a model is shrunk: which pipeline ranks hold a copy of which parameter.

    Config --holders--> {embed.tokens.weight: ranks 0, 3} == of which of the small configs nearby? --> that one

Which stage holds what follows from the costs of the pieces (parallel/pipeline/partition.py), so blocks and words of the
small model are varied until it has the ties of the large one. Pure arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from roots_dist.assembly.rank_model import stage_runs, tie_holders
from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.learning.models import pieces_of
from roots_dist.parallel.tensor.collectives import TensorParallel

VOCABS = (211, 503, 1009, 101)
"""Primes: no tensor degree divides them."""

CANDIDATES = 300
"""Small models that are tried."""

Holders = Mapping[str, tuple[int, ...]]


def holders(config: Config) -> Holders:
    """The pipeline ranks of each parameter that several of them hold."""
    specs = pieces_of(config, TensorParallel())
    return tie_holders(specs, stage_runs(config, specs), config.parallel.pp)


def with_same_ties(config: Config, small: Config) -> tuple[Config, bool]:
    """The first small config nearby that ties what the large one ties, and whether there is one; else `small`.

    On fewer pipeline ranks than the run's the same parameters have to be tied, each by as nearly as many ranks as
    there are.
    """
    if small.parallel.pp == 1:
        return small, True
    wanted, fewer = holders(config), small.parallel.pp < config.parallel.pp
    best, least = small, math.inf
    for candidate in itertools.islice(_nearby(small), CANDIDATES):
        off = _distance(holders(candidate), wanted, small.parallel.pp if fewer else None)
        if off < least:
            best, least = candidate, off
        if off == 0:
            break
    return best, least < math.inf


def _distance(found: Holders, wanted: Holders, ranks: int | None) -> float:
    """The distance of a small model's ties from the wanted ones; `ranks`: its pipeline ranks if the run has more."""
    if ranks is None:
        return 0 if found == wanted else math.inf
    if found.keys() != wanted.keys():
        return math.inf
    return sum(abs(min(len(wanted[name]), ranks) - len(found[name])) for name in found)


def _nearby(small: Config) -> Iterator[Config]:
    """The small config with other numbers of blocks and words, the least blocks first."""
    yield small
    m, stages = small.model, small.num_stages()
    vocabs = VOCABS if m.vocab >= VOCABS[0] else (m.vocab,)
    layers = range(1, 3 * stages + 2)
    second = (
        "model.decoder_layers"
        if family_of(small).has_two_stacks
        else "generator.layers"
        if objective_of(small).has_generator
        else None
    )
    if second is None:
        counts = [(n, 0) for n in layers if n >= stages]
    else:
        counts = [(n, k) for n, k in itertools.product(layers, layers) if n + k >= stages]
    even = m.decoder_layers is None and small.generator.layers in (None, m.layers)
    counts.sort(key=lambda nk: (even and nk[0] != nk[1], sum(nk), abs(nk[0] - nk[1])))
    for (first, other), vocab in itertools.product(counts, vocabs):
        values = {"model.layers": first, "model.vocab": vocab}
        yield small.changed(values if second is None else values | {second: other})
