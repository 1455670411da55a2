"""What is reported of a step."""

import math
from types import SimpleNamespace

import pytest

from roots_dist.accounting.bounds import Bounds
from roots_dist.config.schema import Config
from roots_dist.runs.track.metrics import NAMES
from roots_dist.runs.train.callbacks import callbacks
from roots_dist.runs.train.spikes import Spikes
from roots_dist.runs.train.step import StepReport
from roots_dist.world.mesh import Mesh
from roots_dist.world.stopwatch import Stopwatch


@pytest.mark.parametrize("wish, counted", [("skip", 2.0), ("stop", None)])
def test_steps_that_were_left_out_are_counted_where_that_can_be(wish, counted):
    told = {}
    config = Config.model_validate({"train": {"steps": 9, "nonfinite": wish}})
    state = SimpleNamespace(
        config=config,
        mesh=Mesh.single(),
        run=SimpleNamespace(config=config, mesh=Mesh.single(), watch=Stopwatch()),
        step=3,
        tokens=100,
        skipped=2,
        spikes=Spikes(),
        peak_flops=None,
        bounds=Bounds(None, 1.0),
        trackers=SimpleNamespace(log=lambda step, numbers: told.update(numbers)),
    )
    report, _ = callbacks(state)
    state.step, state.tokens = 4, 140
    report(state, StepReport(math.nan, math.nan, {"clm": math.nan}, {}, skipped="loss is not finite"))
    assert told.get("train/skipped_steps") == counted
    assert set(told) <= set(NAMES) | {"time/left_s"}
