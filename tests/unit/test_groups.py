"""Groups of the optimizer join at their step, and gradients are clipped to a limit."""

import pytest

from roots_dist.parallel.optim.groups import groups_joining
from roots_dist.parallel.optim.norm import clip_factor
from roots_dist.parallel.optim.trainable import Trainable


def test_a_group_joins_at_the_step_that_it_is_trained_from():
    found = {f"blocks.{step}": Trainable(from_step=step) for step in (0, 10, 20)}
    for step in (0, 10, 20):
        joining = groups_joining(found, step, step)
        assert [(group.trainable.from_step, group.decays) for group in joining] == [(step, True), (step, False)]
        assert not groups_joining(found, step + 1, step + 9)


def test_gradients_are_clipped_to_the_limit_and_never_enlarged():
    """Pascanu et al. 2013, section 3.2. A limit of 0 is none."""
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.5, 1.0) == clip_factor(0.0, 1.0) == clip_factor(1e9, 0.0) == 1.0
