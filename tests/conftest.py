"""Options of the whole suite."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from roots_dist import environment, logs
from roots_dist.testing import world

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of every process that tests start, unless it says otherwise. Several workers share the cores, and a thread
that spins while it waits for another takes the core from that one: a run of 150 steps took 58 s instead of 6."""
IMPORTED_LATE = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "numpy.ma",
    "roots_dist.cli.main",
    "roots_dist.parallel.zero.reference",
    "torch._subclasses.schema_check_mode",
    "torch.distributed.launcher.api",
    "torch.profiler._cupti_monitor",
)
"""What ranks and commands of most tests import when they run: hundreds of forks need not, each for itself."""
DEAF_IN_THE_BACKGROUND = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
"""Signals that a shell makes what it starts with `&`, and nohup what it starts, ignore."""


def pytest_addoption(parser):
    parser.addoption(
        "--cluster", action="store_true", help="run tests/cluster too: hosts, daemons and networks, as root"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Modules, tests and their parameters stay until the end: nobody need look through them for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Run what shares fixtures of half a minute first. A worker that has nothing left steals the last tests of another
    one: if these shared a fixture, both would make it."""
    first = Path(__file__).parent / "runs"
    items.sort(key=lambda item: item.path.parent != first)


@pytest.hookimpl(optionalhook=True)  # the runner of mutants leaves xdist out
def pytest_xdist_auto_num_workers(config):
    """One worker more than there are cores: some tests wait for a time limit, a server or a signal, and compute nothing
    meanwhile."""
    return environment.cores() + 1


def pytest_configure(config):
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of hundreds of processes compiles the package again
    sys.dont_write_bytecode = False
    for number in DEAF_IN_THE_BACKGROUND:
        if signal.getsignal(number) is signal.SIG_IGN:  # processes that tests start would inherit that, but no handler
            signal.signal(number, lambda *_: None)
    world.PRELOAD.extend((*IMPORTED_LATE, "brief"))
    logs.FIRST_S = 600.0  # a test that compares what is said does not depend on how busy the machine is
