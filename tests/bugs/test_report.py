"""Speeds that are told: means over the steps since the last report."""

from types import SimpleNamespace

import pytest

from roots_dist.accounting.bounds import Bounds
from roots_dist.config.schema import Config
from roots_dist.runs.ranks.stop_signal import StopSignal
from roots_dist.runs.train import callbacks as callbacks
from roots_dist.runs.train.spikes import Spikes
from roots_dist.runs.train.state import Saves
from roots_dist.runs.train.step import StepReport
from roots_dist.world.mesh import Mesh
from roots_dist.world.stopwatch import Stopwatch

SEQ, BATCH = 8, 4


@pytest.mark.parametrize(
    "first, every, reported", [(0, 1, [1, 2, 3]), (0, 5, [5, 10]), (7, 5, [10, 15]), (0, 50, [20])]
)
def test_speed_does_not_depend_on_how_often_it_is_told(monkeypatch, first, every, reported):
    """Each step takes 2 s, other duties 10 s. With log_every=5 a step seemed to take a fifth, since the clock was set
    back after every step; and after a resume the first report took five steps for three."""
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    told = {}
    config = Config.model_validate(
        {"data": {"seq_length": SEQ}, "train": {"global_batch": BATCH, "log_every": every, "steps": 20}}
    )

    class Running(SimpleNamespace):
        tokens = property(lambda self: self.step * BATCH * SEQ)

    state = Running(
        config=config,
        mesh=Mesh.single(),
        run=SimpleNamespace(config=config, mesh=Mesh.single(), watch=Stopwatch()),
        step=first,
        spikes=Spikes(),
        peak_flops=1e9,
        bounds=Bounds(None, 1.0),
        held_out=None,
        best=None,
        saves=Saves(first),
        stop=StopSignal(),
        trackers=SimpleNamespace(log=lambda step, numbers: told.update({step: numbers})),
    )
    do = callbacks.callbacks(state)
    while state.step < max(reported):
        state.step += 1
        now[0] += 2.0
        do[0](state, StepReport(1.0, 1.0, {"clm": 1.0}, {"decayed": 1.0}))
        now[0] += 10.0
        do[1](state, StepReport(1.0, 1.0, {"clm": 1.0}, {"decayed": 1.0}))
    assert sorted(told) == reported
    for numbers in told.values():
        assert numbers["time/step_s"] == 2.0
        assert numbers["speed/tokens_per_s"] == BATCH * SEQ / 2
        assert numbers["util/mfu_fraction"] == pytest.approx(callbacks.flops_per_step(config, BATCH) / 2 / 1e9)
