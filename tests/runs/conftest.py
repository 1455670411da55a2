"""What whole runs need before their first world."""

from __future__ import annotations

import pytest

from roots_dist.testing import world


@pytest.fixture(scope="session", autouse=True)
def slow_imports():
    """For the forkserver, if it has not started; else each rank of a fine-tuning takes seconds. Workers that run none
    of these tests need them not."""
    world.PRELOAD.extend(("sklearn.metrics", "matplotlib.backends.backend_agg", "matplotlib.figure"))
