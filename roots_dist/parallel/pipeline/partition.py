"""Which pieces of the model go to which stage: contiguous runs, the dearest stage as cheap as can be.

    models/ --pieces, their costs--> partition --one range of pieces per stage--> assembly/run.py, plan/

A pipeline runs at the pace of its dearest stage. Pure arithmetic, exact: costs are compared as integers, so that equal
layers tie and every rank of every machine comes to the same cut.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from roots_dist.errors import ConfigError, Problem


def partition(costs: Sequence[float], num_stages: int, required: Sequence[bool]) -> list[range]:
    """Cut the pieces into `num_stages` runs, each with at least one required piece (a Transformer block).

    Of all such cuts: the smallest maximum of the stages' costs; of these the most even (least sum of squares); of these
    the lightest first and last stage together, which have other work to do; of these the one with the earlier stages
    lighter, which hold more activations. Raises ConfigError if there are fewer required pieces than stages.
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
    upto = _prefix_sums(costs)
    first = _next_required(required)
    bound = _least_bound(upto, first, num_stages)
    return _most_even(upto, first, num_stages, bound)


def _prefix_sums(costs: Sequence[float]) -> list[int]:
    """upto[i] is the cost of the first i pieces in a unit in which all costs are whole numbers."""
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    return [0, *accumulate(int(cost * unit) for cost in exact)]


def _next_required(required: Sequence[bool]) -> list[int]:
    """first[i]: where a stage that begins at piece i may end at the earliest, just behind its first required piece."""
    first = [len(required) + 1] * (len(required) + 1)
    for i in reversed(range(len(required))):
        first[i] = i + 1 if required[i] else first[i + 1]
    return first


def _least_bound(upto: list[int], first: list[int], num_stages: int) -> int:
    """The smallest maximum cost. It is the cost of some run, so a binary search over those finds it.

    It suffices to ask for at most `num_stages` stages: a stage with two required pieces can be cut between them.
    """
    runs = sorted({end - start for i, start in enumerate(upto) for end in upto[i + 1 :]})
    return runs[bisect_left(runs, True, key=lambda bound: _fewest_stages(upto, first, bound) <= num_stages)]


def _fewest_stages(upto: list[int], first: list[int], bound: int) -> float:
    """How many stages of at most this cost it takes; inf if none will do."""
    fewest = [0.0] + [math.inf] * (len(upto) - 1)
    for start in range(len(upto) - 1):
        for end in range(first[start], len(upto)):
            if upto[end] - upto[start] > bound:
                break
            fewest[end] = min(fewest[end], fewest[start] + 1)
    return fewest[-1]


def _most_even(upto: list[int], first: list[int], num_stages: int, bound: int) -> list[range]:
    """Dynamic programming over (stages so far, pieces so far) among the cuts with no stage above the bound."""
    cuts: list[dict[int, int]] = []  # cuts[k][end]: where stage k begins if it ends there
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # end -> (sum of squares, cost of first and last stage)
    for k in range(num_stages):
        is_end = k in (0, num_stages - 1)
        nearer: dict[int, tuple[int, int]] = {}
        begins: dict[int, int] = {}
        for start, (squares, ends) in sorted(best.items()):
            for end in range(first[start], len(upto)):
                cost = upto[end] - upto[start]
                if cost > bound:
                    break
                score = squares + cost * cost, ends + cost * is_end
                if end not in nearer or score < nearer[end]:  # at a tie the earlier start: later stages longer
                    nearer[end], begins[end] = score, start
        best = nearer
        cuts.append(begins)

    stages: list[range] = []
    end = len(upto) - 1
    for begins in reversed(cuts):
        stages.insert(0, range(begins[end], end))
        end = begins[end]
    return stages
