"""Which evaluation of a run is the best, and when a run stops because there was none better for a while."""

import pytest

from roots_dist.runs.train.best_evaluation import BestEvaluation


@pytest.mark.parametrize(
    "metric, before, values, best",
    [("loss/validation", -9, [3, 1, 2, 2], 2), ("f1/validation", 9, [3, 1, 4, 2, 2], 3)],
    ids=["loss", "score"],
)
def test_the_best_is_the_lowest_loss_or_the_highest_score(metric, before, values, best):
    kept = BestEvaluation(metric, patience=2)
    kept.note(0, {metric: before})  # before the first step there is no checkpoint
    for step, value in enumerate(values, 1):
        assert not kept.should_stop
        kept.note(step, {metric: value})
    assert kept.step == best and kept.should_stop
