"""Options of the whole suite."""

from __future__ import annotations

from roots_dist.testing import world


def pytest_addoption(parser):
    parser.addoption(
        "--cluster", action="store_true", help="run tests/cluster too: hosts, daemons and networks, as root"
    )


def pytest_configure(config):
    world.PRELOAD.extend(
        ("sklearn.metrics", "matplotlib.backends.backend_agg")
    )  # else each rank of a fine-tuning takes seconds
