"""Partition the model's pieces into stages: contiguous ranges, with the most expensive stage as cheap as possible.

    models/ --pieces, their costs--> partition --one range of pieces per stage--> assembly/rank_model.py, runs/plan/

A pipeline is as fast as its most expensive stage. Pure and exact arithmetic: costs are compared as integers, so that
equal layers tie and every rank of every machine computes the same cut.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from roots_dist.errors import ConfigError, Problem


def partition(costs: Sequence[float], num_stages: int, required: Sequence[bool]) -> list[range]:
    """Cut the pieces into `num_stages` ranges, each with at least one required piece (a Transformer block).

    Among all such cuts, choose the smallest maximum cost of a stage; then the most even one (least sum of squares);
    then the cheapest first and last stage together, which have additional work; then the one with cheaper early stages,
    which hold more activations. Raises ConfigError if there are fewer required pieces than stages.
    """
    assert len(costs) == len(required) and num_stages >= 1, (len(costs), len(required), num_stages)
    assert all(math.isfinite(cost) and cost >= 0 for cost in costs), costs
    if sum(required) < num_stages:
        raise ConfigError(
            [
                Problem(
                    key="number of stages (pp * chunks)",
                    found=num_stages,
                    expected=f"at most {sum(required)}, the number of Transformer blocks",
                    fix="lower parallel.pp or parallel.virtual_stages, or use more layers",
                )
            ]
        )
    prefix = _prefix_sums(costs)
    first = _next_required(required)
    bound = _least_bound(prefix, first, num_stages)
    return _most_even(prefix, first, num_stages, bound)


def _prefix_sums(costs: Sequence[float]) -> list[int]:
    """prefix[i] is the cost of the first i pieces, in a unit in which all costs are integers."""
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    return [0, *accumulate(int(cost * unit) for cost in exact)]


def _next_required(required: Sequence[bool]) -> list[int]:
    """first[i] is the earliest end of a stage that begins at piece i: just behind its first required piece."""
    first = [len(required) + 1] * (len(required) + 1)
    for i in reversed(range(len(required))):
        first[i] = i + 1 if required[i] else first[i + 1]
    return first


def _least_bound(prefix: list[int], first: list[int], num_stages: int) -> int:
    """The smallest possible maximum cost. It is the cost of some range, so a binary search over the ranges finds it.

    It suffices to ask for at most `num_stages` stages: a stage with two required pieces can be cut between them.
    """
    runs = sorted({end - start for i, start in enumerate(prefix) for end in prefix[i + 1 :]})
    return runs[bisect_left(runs, True, key=lambda bound: _fewest_stages(prefix, first, bound) <= num_stages)]


def _fewest_stages(prefix: list[int], first: list[int], bound: int) -> float:
    """The fewest stages of at most this cost; inf if it is impossible."""
    fewest = [0.0] + [math.inf] * (len(prefix) - 1)
    for start in range(len(prefix) - 1):
        for end in range(first[start], len(prefix)):
            if prefix[end] - prefix[start] > bound:
                break
            fewest[end] = min(fewest[end], fewest[start] + 1)
    return fewest[-1]


def _most_even(prefix: list[int], first: list[int], num_stages: int, bound: int) -> list[range]:
    """Dynamic programming over (stages so far, pieces so far) among the cuts with no stage above the bound."""
    cuts: list[dict[int, int]] = []  # cuts[k][end]: begin of stage k if it ends at `end`
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # end -> (sum of squares, cost of first and last stage)
    for k in range(num_stages):
        is_end = k in (0, num_stages - 1)
        nearer: dict[int, tuple[int, int]] = {}
        begins: dict[int, int] = {}
        for start, (squares, ends) in sorted(best.items()):
            for end in range(first[start], len(prefix)):
                cost = prefix[end] - prefix[start]
                if cost > bound:
                    break
                score = squares + cost * cost, ends + cost * is_end
                if end not in nearer or score < nearer[end]:  # at a tie the earlier start: later stages longer
                    nearer[end], begins[end] = score, start
        best = nearer
        cuts.append(begins)

    stages: list[range] = []
    end = len(prefix) - 1
    for begins in reversed(cuts):
        stages.insert(0, range(begins[end], end))
        end = begins[end]
    return stages
