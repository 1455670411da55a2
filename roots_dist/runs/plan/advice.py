"""Changes of a config with which a plan that does not fit does: each is planned before it is told.

config, processes, bytes of a GPU --changes_that_fit--> Way({"train.recompute": "full"}, its peak, processes)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError
from roots_dist.layout import Layout
from roots_dist.runs.plan.predict import predict


class Way(NamedTuple):
    """Changes with which a plan fits."""

    changes: Mapping[str, object]
    peak: int
    """Bytes of the process that needs most then."""
    processes: int
    """Number of processes that was planned."""


LONGEST_S = 20.0
"""Seconds after which no other change is planned: a large model takes some of them for each."""
MOST_TP = 8
"""Tensor ranks of a node, beyond which tensor parallelism is slow."""


def changes_that_fit(
    config: Config, processes: int | None, room: int, layout_of: Callable[[Config, int], Layout]
) -> Way | None:
    """The first change, of the cheaper ones first, with which no process needs more than `room` bytes; None if none was
    found in time. processes: of the whole run, if it is given; otherwise as many as the
    changed layout needs. layout_of raises ConfigError for what cannot train."""
    end = time.monotonic() + LONGEST_S
    for changes in _candidates(config, processes):
        if time.monotonic() > end:
            return None
        try:
            changed = config.changed(changes)
            size = processes or changed.parallel.least_ranks()
            layout = layout_of(changed, size)
        except ConfigError:
            continue
        if (peak := predict(changed, layout).peak) <= room:
            return Way(changes, peak, size)
    return None


def _candidates(config: Config, processes: int | None) -> Iterator[dict[str, object]]:
    """Recomputation and ZeRO cost time alone; more tensor ranks cost messages, more stages a bubble."""
    p, train = config.parallel, config.train
    cheap: list[dict[str, object]] = [{}]
    if train.recompute != "full":
        cheap += [{"train.recompute": "full"}]
    if train.micro_batch > 1:
        cheap += [change | {"train.micro_batch": 1} for change in cheap]
    data_ranks = 1 if processes is None else processes // p.least_ranks()
    if data_ranks > 1 and p.zero_stage < 3:
        cheap += [change | {"parallel.zero_stage": 3} for change in cheap]
    yield from cheap[1:]
    for times in (2, 4, 8, 16, 32):
        for tp in (min(p.tp * times, MOST_TP), p.tp):
            pp = p.pp * p.tp * times // tp
            cut: dict[str, object] = {"parallel.tp": tp} if tp != p.tp else {}
            cut |= {"parallel.pp": pp} if pp != p.pp else {}
            cut |= {"parallel.sequence_parallel": True} if tp > 1 and not p.sequence_parallel else {}
            for change in (cheap[0], cheap[-1]):
                yield change | cut
