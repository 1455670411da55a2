"""Sample order: permutations without memory, blends without history, both against naive versions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roots_dist.config.batch_ramp import batch_size_at, batch_sizes, samples_before, step_after
from roots_dist.config.sections import TrainConfig
from roots_dist.learning.data.order import choose_sources, fraction, permuted, sample_of


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_takes_every_index_once(size, key):
    assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2**33, 2**52), start=st.integers(0, 2**33 - 100))
def test_a_huge_permutation_needs_no_memory_and_stays_inside(size, start):
    found = permuted(np.arange(start, start + 100), size, 7)
    assert len(set(found.tolist())) == 100 and found.min() >= 0 and found.max() < size


def test_every_order_of_three_is_about_equally_frequent():
    orders = permuted(np.tile(np.arange(3), 6000), 3, np.repeat(np.arange(6000), 3)).reshape(-1, 3)
    frequency = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(frequency) == 6 and min(frequency) > 850 and max(frequency) < 1150  # 5 standard deviations: 144


def test_each_place_receives_each_index_about_equally_often():
    size, keys = 50, 4000
    hits = np.zeros((size, size))
    index = np.tile(np.arange(size), keys)
    np.add.at(hits, (index, permuted(index, size, np.repeat(np.arange(keys), size))), 1)
    chi_square = ((hits - keys / size) ** 2 / (keys / size)).sum()
    assert abs(chi_square - (size - 1) ** 2) < 5 * np.sqrt(2) * (size - 1)


def test_neighbours_do_not_stay_neighbours():
    found = permuted(np.arange(100_000), 100_000, 3)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), found)[0, 1]) < 0.02


def test_an_epoch_holds_every_sample_once_and_epochs_differ():
    epochs = sample_of(np.arange(300), 100, seed=1).reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert (sample_of(np.arange(100), 100, seed=2) != epochs[0]).any()


@given(cut=st.integers(0, 250))
def test_order_may_be_taken_up_anywhere(cut):
    whole = sample_of(np.arange(250), 37, seed=9)
    resumed = np.concatenate([sample_of(np.arange(cut), 37, 9), sample_of(np.arange(cut, 250), 37, 9)])
    assert (whole == resumed).all()


def test_the_order_of_published_runs_never_changes():
    """Pinned: another order would silently change every run that is resumed."""
    assert sample_of(np.arange(8), 1000, seed=1234).tolist() == [598, 245, 694, 355, 676, 820, 513, 51]
    assert choose_sources(0, 12, [3, 1, 2])[0].tolist() == [0, 2, 0, 1, 2, 0, 0, 2, 0, 1, 2, 0]
    assert [float(f).hex() for f in fraction(1234, np.arange(2))] == ["0x1.c7de1a71b2aecp-2", "0x1.300ad9e6bb357p-1"]


def webster(count, weights):
    """One at a time, exactly: next is whoever has the largest weight / (samples given + ½), the first of equals."""
    taken, out = [0] * len(weights), []
    for _ in range(count):
        k = max(range(len(weights)), key=lambda k: (Fraction(weights[k]) / (2 * taken[k] + 1), -k))
        out.append((k, taken[k]))
        taken[k] += 1
    return out


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(1, 100), min_size=1, max_size=6), start=st.integers(0, 200), count=st.integers(0, 60)
)
def test_blends_are_websters_method(weights, start, count):
    weights = [*weights, 1024 - sum(weights)]  # then shares have no rounding, and ties fall the same way
    which, nth = choose_sources(start, count, weights)
    assert list(zip(which, nth)) == webster(start + count, weights)[start:]


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=8), start=st.integers(0, 500), count=st.integers(0, 60)
)
def test_a_window_of_a_blend_is_a_piece_of_the_whole(weights, start, count):
    which, nth = choose_sources(start, count, weights)
    whole = choose_sources(0, start + count, weights)
    assert (whole[0][start:] == which).all() and (whole[1][start:] == nth).all()


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8), count=st.integers(1, 400))
def test_blends_keep_to_their_shares_at_every_prefix_and_skip_nothing(weights, count):
    which, nth = choose_sources(0, count, weights)
    share = np.array(weights) / sum(weights)
    for k in range(len(weights)):
        assert nth[which == k].tolist() == list(range((which == k).sum()))
        taken = np.cumsum(which == k)
        assert (np.abs(taken - share[k] * np.arange(1, count + 1)) <= 0.5 + share[k] * len(weights) / 2 + 1e-6).all()


def test_a_blend_far_into_a_run_costs_no_more():
    which, nth = choose_sources(10**12, 1000, [0.7, 0.2, 0.1])
    assert np.bincount(which).tolist() == [700, 200, 100] and abs(nth[which == 1][0] - 2 * 10**11) <= 2


def test_steps_and_samples_of_a_ramp_agree_with_counting():
    train = TrainConfig(global_batch=32, batch_ramp=(8, 8, 300))
    consumed = 0
    for step in range(40):
        assert samples_before(train, step) == consumed
        by_hand = min(8 + 8 * (consumed // 100), 32)
        assert batch_size_at(train, step) == by_hand
        consumed += by_hand
    assert batch_sizes(train) == [8, 16, 24, 32]


@settings(max_examples=200, deadline=None)
@given(start=st.integers(1, 40), increment=st.integers(1, 40), samples=st.integers(0, 500), step=st.integers(0, 100))
def test_any_ramp_is_consistent_and_never_shrinks(start, increment, samples, step):
    train = TrainConfig(global_batch=40, batch_ramp=(start, increment, samples))
    assert samples_before(train, 0) == 0
    assert samples_before(train, step + 1) == samples_before(train, step) + batch_size_at(train, step)
    assert start <= batch_size_at(train, step) <= batch_size_at(train, step + 1) <= 40
    assert samples_before(train, 1000) < samples or batch_size_at(train, 1000) == 40
    assert step_after(train, samples_before(train, step)) == step
    assert step_after(train, samples_before(train, step) + 1) == step + 1


@pytest.mark.parametrize("step", [0, 1, 10**9])
def test_without_a_ramp_the_batch_is_the_batch(step):
    assert (batch_size_at(TrainConfig(global_batch=6), step), samples_before(TrainConfig(global_batch=6), step)) == (
        6,
        6 * step,
    )
