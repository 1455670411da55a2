"""Trials run when they are asked for: pytest tests/cluster --cluster -s (-s shows what they measured)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from namespaces import ROOT, environment, lacking
from trials import ROOTS, Trial, alone

MINUTES = 20


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent.name != "cluster":
            continue
        programs = getattr(item.module, "PROGRAMS", ())
        if not config.getoption("--cluster"):
            item.add_marker(
                pytest.mark.skip(reason="makes hosts and networks on this machine: ask for it with --cluster")
            )
        elif reason := lacking(*programs):
            item.add_marker(pytest.mark.skip(reason=reason))
        item.add_marker(pytest.mark.timeout(60 * MINUTES))


@pytest.fixture(scope="session", autouse=True)
def corpus() -> None:
    """Make the quickstart's corpus where its config looks for it, as `make train` does, unless it is there."""
    folder = ROOT / "data/sotu"
    if not (folder / "manifest.json").exists():
        command = [*ROOTS, "prepare", "embedded:state-of-the-union", "--output", str(folder), "--vocab", "4096"]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=600)


@pytest.fixture(scope="session")
def expected(tmp_path_factory) -> Callable[[Trial], dict]:
    """Losses of a trial's run in one place: each kind of run is done once."""
    folder, known = tmp_path_factory.mktemp("alone"), {}

    def of(trial: Trial) -> dict:
        key = (trial.steps, trial.every)
        if key not in known:
            known[key] = alone(Trial(folder, trial.steps, trial.every))
        return known[key]

    return of
