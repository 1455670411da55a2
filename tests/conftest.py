"""Options of the whole suite."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--cluster", action="store_true", help="run tests/cluster too: hosts, daemons and networks, as root")
