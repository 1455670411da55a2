"""The cut is the best there is (against trying them all), deterministic, quick, and refuses what cannot be."""

import itertools
import random
import time

import pytest

from roots_dist.errors import ConfigError
from roots_dist.parallel.pipeline.partition import partition


def every_cut(costs, num_stages, required):
    """All cuts with a required piece in each stage, as lists of ranges."""
    for inner in itertools.combinations(range(1, len(costs)), num_stages - 1):
        ends = [0, *inner, len(costs)]
        cut = [range(a, b) for a, b in itertools.pairwise(ends)]
        if all(any(required[i] for i in stage) for stage in cut):
            yield cut


def summarize(costs, cut):
    """Worst stage, then unevenness, then the two ends (one stage is both)."""
    stages = [sum(costs[i] for i in stage) for stage in cut]
    ends = stages[0] + stages[-1] if len(stages) > 1 else stages[0]
    return max(stages), sum(cost * cost for cost in stages), ends


def blocks(cut, required):
    return [sum(required[i] for i in stage) for stage in cut]


def gpt(num_blocks, embedding=0.0, head=0.0, block=1.0):
    return [embedding, *[block] * num_blocks, head], [False, *[True] * num_blocks, False]


def test_no_cut_is_better():
    draws = random.Random(3)
    refused = 0
    for _ in range(1500):
        n, num_stages = draws.randint(1, 9), draws.randint(1, 5)
        costs = [draws.choice([0, 0, 1, 1, 2, 3, 7, 20]) for _ in range(n)]
        required = [draws.random() < 0.6 for _ in range(n)]
        cuts = list(every_cut(costs, num_stages, required))
        if not cuts:
            refused += 1
            with pytest.raises(ConfigError):
                partition(costs, num_stages, required)
            continue
        found = partition(costs, num_stages, required)
        assert found in cuts, (costs, required, num_stages)
        assert summarize(costs, found) == min(summarize(costs, cut) for cut in cuts), (costs, required, num_stages)
    assert 100 < refused < 1400


@pytest.mark.parametrize(
    "model, num_stages, expected",
    [
        (gpt(12), 4, [3, 3, 3, 3]),
        (gpt(7), 3, [2, 3, 2]),  # the ends are lighter
        (gpt(10), 4, [2, 3, 3, 2]),
        (gpt(11), 4, [2, 3, 3, 3]),  # rank 0 holds the most activations
        (gpt(12, embedding=0.5, head=3.0), 4, [3, 4, 4, 1]),
        (gpt(78, embedding=1.0, head=1.0), 12, [5, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 5]),
        (gpt(4, embedding=100.0, head=100.0), 4, [1, 1, 1, 1]),  # a stage without a block is none
        (gpt(5), 1, [5]),
    ],
)
def test_blocks_per_stage(model, num_stages, expected):
    costs, required = model
    assert blocks(partition(costs, num_stages, required), required) == expected


def test_equal_layers_tie_whatever_their_cost():
    for block in (0.1, 1 / 3, 1e-9, 1e300, 7.0):
        costs, required = gpt(11, block=block)
        assert blocks(partition(costs, 4, required), required) == [2, 3, 3, 3]


def test_pieces_in_the_middle_that_are_no_blocks_go_where_there_is_room():
    costs = [1, 4, 4, 4, 3, 4, 4, 4, 1]  # an encoder, a bridge, a decoder
    required = [False, True, True, True, False, True, True, True, False]
    found = partition(costs, 3, required)
    assert found == [range(3), range(3, 6), range(6, 9)] and summarize(costs, found)[0] == 11


def test_hundreds_of_layers_over_dozens_of_stages_take_milliseconds():
    draws = random.Random(5)
    costs = [draws.random() for _ in range(160)]
    began = time.process_time()
    found = partition(costs, 53, [True] * 160)
    assert time.process_time() - began < 1.0
    assert [i for stage in found for i in stage] == list(range(160)) and len(found) == 53
    assert found == partition(costs, 53, [True] * 160)


def test_more_stages_than_blocks_are_refused():
    costs, required = gpt(3)
    with pytest.raises(ConfigError) as error:
        partition(costs, 4, required)
    (problem,) = error.value.problems
    assert problem.found == 4 and "at most 3" in problem.expected and "parallel.pp" in problem.fix


@pytest.mark.parametrize("costs", [[1.0, float("nan")], [1.0, -1.0], [float("inf"), 1.0], [1.0]])
def test_costs_that_are_no_costs_are_ours_to_mend(costs):
    with pytest.raises(AssertionError):
        partition(costs, 1, [True, True])
