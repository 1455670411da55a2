"""Partition the model's pieces into stages: contiguous ranges, with the most expensive stage as cheap as possible.

    models/ --pieces, their costs--> partition --one range of pieces per stage--> assembly/rank_model.py, runs/plan/

A pipeline is as fast as its most expensive stage. Pure and exact arithmetic: costs are compared as integers, so that
equal layers tie and every rank of every machine computes the same cut.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
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
    bound = _least_bound(prefix, required, num_stages)
    return _most_even(prefix, required, num_stages, bound)


def _prefix_sums(costs: Sequence[float]) -> list[int]:
    """prefix[i] is the cost of the first i pieces, in a unit in which all costs are integers."""
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    return [0, *accumulate(int(cost * unit) for cost in exact)]


def _starts(prefix: Sequence[int], required: Sequence[bool], bound: int) -> list[range]:
    """starts[end]: where a stage may begin that ends before piece `end`, costs at most `bound` and has a required
    piece. Both ends of these ranges grow with `end`."""
    found = [range(0)]
    lowest = last_required = 0
    for end in range(1, len(prefix)):
        last_required = end if required[end - 1] else last_required
        while prefix[end] - prefix[lowest] > bound:
            lowest += 1
        found.append(range(lowest, last_required))
    return found


def _fewest_stages(starts: Sequence[range]) -> list[float]:
    """fewest[end]: the fewest stages into which the first `end` pieces can be cut; inf if it is impossible.

    Each is one more than the smallest within a window of earlier ones, and the window only moves on: a queue of those
    that may still become the smallest makes it linear (sliding-window minimum).
    """
    fewest = [0.0]
    queue: deque[int] = deque()
    entered = 0
    for window in starts[1:]:
        for start in range(entered, window.stop):
            while queue and fewest[queue[-1]] >= fewest[start]:
                queue.pop()
            queue.append(start)
        entered = max(entered, window.stop)
        while queue and queue[0] < window.start:
            queue.popleft()
        fewest.append(1 + fewest[queue[0]] if queue else math.inf)
    return fewest


def _least_bound(prefix: Sequence[int], required: Sequence[bool], num_stages: int) -> int:
    """The smallest possible maximum cost of a stage, found by bisection.

    It suffices to ask for at most `num_stages` stages: a stage with two required pieces can be cut between them.
    """
    low, high = 0, prefix[-1]
    while low < high:
        middle = (low + high) // 2
        if _fewest_stages(_starts(prefix, required, middle))[-1] <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def _reachable(
    prefix: Sequence[int], required: Sequence[bool], num_stages: int, bound: int
) -> Iterator[tuple[int, int]]:
    """All pairs (stages, end): the first `end` pieces can be that many stages, and the other pieces the remaining ones.

    A run of pieces can be cut into any number of stages from its fewest to the number of its required pieces.
    """
    before = _fewest_stages(_starts(prefix, required, bound))
    mirrored = [prefix[-1] - cost for cost in reversed(prefix)]
    after = _fewest_stages(_starts(mirrored, required[::-1], bound))[::-1]
    blocks = [0, *accumulate(map(int, required))]
    for end in range(len(prefix)):
        if math.isfinite(before[end] + after[end]):
            least = max(int(before[end]), num_stages - (blocks[-1] - blocks[end]))
            most = min(blocks[end], num_stages - int(after[end]))
            yield from ((stages, end) for stages in range(least, most + 1))


def _most_even(prefix: Sequence[int], required: Sequence[bool], num_stages: int, bound: int) -> list[range]:
    """Dynamic programming over (stages so far, pieces so far) among the cuts with no stage above the bound."""
    ends: list[list[int]] = [[] for _ in range(num_stages + 1)]
    for stages_so_far, end in _reachable(prefix, required, num_stages, bound):
        ends[stages_so_far].append(end)
    starts = _starts(prefix, required, bound)
    cuts: list[dict[int, int]] = []  # cuts[k][end]: begin of stage k if it ends at `end`
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # end -> (sum of squares, cost of first and last stage)
    for k in range(num_stages):
        is_end = k in (0, num_stages - 1)
        nearer: dict[int, tuple[int, int]] = {}
        begins: dict[int, int] = {}
        for end in ends[k + 1]:
            scores = []
            for start in starts[end]:
                if start in best:
                    squares, both_ends = best[start]
                    cost = prefix[end] - prefix[start]
                    scores.append((squares + cost * cost, both_ends + cost * is_end, start))
            squares, both_ends, begins[end] = min(scores)  # at a tie the earlier start: later stages longer
            nearer[end] = squares, both_ends
        best = nearer
        cuts.append(begins)

    stages: list[range] = []
    end = len(prefix) - 1
    for begins in reversed(cuts):
        stages.append(range(begins[end], end))
        end = begins[end]
    return stages[::-1]
