"""Spikes of the loss are skipped by a rule that odd values do not move; slow ranks are found by what they compute."""

from __future__ import annotations

import math

import pytest
import torch

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train.slow_ranks import SlowRanks
from roots_dist.runs.train.spikes import Spikes, SpikesError
from roots_dist.runs.train.step import train_step
from roots_dist.world.mesh import Mesh


def test_a_spike_is_above_the_median_by_the_spread_and_never_in_the_window():
    spikes = Spikes(5.0)
    for step in range(15):
        spikes.note(step, 2.0 + 0.1 * (step % 3), False)
    assert spikes.loss.limit == math.inf  # too few to judge by
    spikes.note(16, math.nan, False)
    spikes.note(17, 2.1, False)
    limit = spikes.loss.limit
    assert limit == pytest.approx(2.1 + 5 * 1.4826 * 0.1)
    spikes.note(18, 50.0, True)
    spikes.note(19, 60.0, True)
    assert spikes.loss.limit == limit and 50.0 not in spikes.saved()["losses"]
    assert Spikes(5.0, **spikes.saved()).loss.limit == limit and Spikes(None, **spikes.saved()).loss.limit == math.inf
    with pytest.raises(SpikesError, match="step 20: loss 70 is the third spike in a row"):
        spikes.note(20, 70.0, True)


def test_a_step_that_was_skipped_for_its_gradient_says_nothing_of_spikes():
    spikes = Spikes(5.0, [2.0] * 16)
    spikes.note(17, 50.0, True, True)
    spikes.note(18, 2.5, False, True)  # its loss is finite, the norm of its gradient was not
    assert spikes.saved() == {"losses": [2.0] * 16, "spikes_in_a_row": 1}
    spikes.note(19, 50.0, True, True)
    resumed = Spikes(5.0, **spikes.saved())
    with pytest.raises(SpikesError, match="step 20"):
        resumed.note(20, 50.0, True, True)


def test_equal_losses_have_a_spread_of_a_hundredth():
    spikes = Spikes(3.0, [4.0] * 64)
    assert spikes.loss.limit == pytest.approx(4.0 + 3 * 0.04)


def test_a_norm_is_judged_by_a_window_of_its_own_that_no_skipped_step_enters():
    spikes = Spikes(None, norm_threshold=4.0)
    for step in range(16):
        spikes.note(step, math.nan if step % 2 else 3.0, False, norm=1.0 + step % 2)
    for norm in (math.nan, math.inf):
        spikes.note(17, 3.0, False, norm=norm)
    assert spikes.loss.limit == math.inf and spikes.norm.limit == pytest.approx(1.5 + 4 * 1.4826 * 0.5)
    for step in (18, 19):
        spikes.note(step, 3.0, True, True, norm=90.0)
    assert spikes.saved() == {"norms": [1.0, 2.0] * 8, "spikes_in_a_row": 2}
    with pytest.raises(SpikesError, match="step 20: gradient norm 90 is the third spike in a row"):
        spikes.note(20, 3.0, True, True, norm=90.0)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_above_the_limit_changes_nothing_and_the_next_is_as_if_it_had_not_been(what):
    small = {"model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 61}, "data": {"seq_length": 8}}
    config = Config.model_validate({**small, "train": {"global_batch": 2, "device": "cpu"}})
    weights = []
    for spikes in (False, True):
        run = build_run(config, Mesh.single(), objective=proof_objective(config))
        if spikes:
            limits = {"limit": 0.5} if what == "loss" else {"norm_limit": 1e-3}
            report = train_step(run, random_batches(config, 5, 0, 1), 1e-2, stop=15, **limits)
            assert (
                report.is_spike
                and report.stop == 15
                and report.skipped.startswith(f"{what} ")
                and "is a spike: it is above 0." in report.skipped
            )
            assert all(p.tensor.grad is None for p in run.params)
        assert not train_step(run, random_batches(config, 0, 0, 1), 1e-2, limit=100.0, norm_limit=1e3).skipped
        weights.append([p.tensor.detach().clone() for p in run.params])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_a_rank_is_slow_by_what_it_computes_in_three_reports():
    slow = SlowRanks(Layout(dp=2, pp=2))
    parts = {"data": [0.0] * 4, "compute": [0.1, 0.7, 0.3, 0.3], "dp": [0.6, 0.0, 0.4, 0.4]}
    assert slow.note(parts, 0.7) == {} == slow.note(parts, 0.7)
    assert slow.note(parts, 0.7) == {1: (0.7, 0.1)}
    assert slow.note(parts, 0.7) == {}  # said once
    waits = {"data": [0.0] * 2, "compute": [0.2, 0.2], "dp": [0.0, 0.9]}
    waiting = SlowRanks(Layout(dp=2))
    assert not any(waiting.note(waits, 1.0) for _ in range(4))
