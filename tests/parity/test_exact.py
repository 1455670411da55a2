"""With train.exact no bit of a run depends on its layout: digests of loss, norm, weights, moments after every step."""

import functools

import pytest
from models import config

from roots_dist.checks.checks import check_used
from roots_dist.config.schema import Config
from roots_dist.testing.bits import Bits, first_difference, merge_bits, trace_bits
from roots_dist.testing.world import on_warm_world

EXACT = dict(advanced__float64=False, train__micro_batch=1, optim__lr=1e-2)
"""Of every case, beside what models.py has: dropout and clipping act, and a step has several microbatches."""


def exact(model: str, degrees: tuple[int, int], **changes: object) -> Config:
    values = EXACT | {"train__exact": {"tensor": degrees[0], "data": degrees[1]}} | changes
    return config(model, **{key if "__" in key else f"parallel__{key}": value for key, value in values.items()})


@functools.cache
def _alone(config: Config, steps: int) -> list[Bits]:
    return merge_bits([trace_bits_here(config, steps)])


def trace_bits_here(config: Config, steps: int):
    return trace_bits(0, 1, config, 0, steps)


def compare(model: str, degrees: tuple[int, int], steps: int, changes: dict[str, object]) -> None:
    """One process, and a layout: `dp` is a number of ranks, all other changes are keys."""
    changes = dict(changes)
    dp, precision = changes.pop("dp", 1), changes.get("train__precision", "fp32")
    layout = exact(model, degrees, **changes)
    ranks = layout.parallel.ranks_per_sample() * dp
    assert not check_used(layout, ranks)
    found = merge_bits(on_warm_world(ranks, trace_bits, layout, 0, steps))
    alone = _alone(exact(model, degrees, train__precision=precision), steps)
    assert first_difference(alone, found) is None
    assert len(set(map(str, found))) == steps  # and each step changes something


SAMPLE = [
    ("gpt", (2, 2), dict(dp=2, tp=2, sequence_parallel=True, zero_stage=1)),
    ("llama", (4, 2), dict(tp=2, pp=2, schedule="zb-h1", train__precision="bf16")),
]


@pytest.mark.parametrize("model, degrees, changes", SAMPLE)
def test_no_bit_depends_on_the_layout(model, degrees, changes):
    compare(model, degrees, 2, changes)
