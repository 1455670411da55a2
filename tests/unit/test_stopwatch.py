"""Where the seconds of a step went: laps add up to the time, and waiting is told from computing."""

from __future__ import annotations

import time

import pytest

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.pipeline.stage import Stage
from roots_dist.runs.train import step
from roots_dist.runs.train.callbacks import rank_metrics
from roots_dist.runs.train.step import train_step
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh
from roots_dist.world.stopwatch import PARTS, Stopwatch

SLOW_S, LATE_S, MICROBATCHES = 0.06, 0.1, 4


def test_laps_add_up_and_taking_begins_anew(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    for what, seconds in (("data", 1.0), ("compute", 2.0), ("pp_wait", 4.0), ("compute", 8.0)):
        now[0] += seconds
        watch.lap(what)
    now[0] += 100.0  # of no lap
    assert watch.take() == {"data": 1.0, "compute": 10.0, "pp_wait": 4.0}
    now[0] += 3.0
    watch.lap("dp")
    assert watch.take() == {"dp": 3.0} and watch.take() == {}


def one_step(rank: int, size: int, slow: int, tp: int = 1, pp: int = 1, cp: int = 1) -> dict[str, object]:
    """A step of a rank of which the forward passes take SLOW_S longer on rank `slow`, and the sums at their end LATE_S
    longer on all."""
    config = Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 61},
            "data": {"seq_length": 8},
            "parallel": {"tp": tp, "pp": pp, "cp": cp, "cp_kind": "heads", "zero_stage": 0},
            "train": {"global_batch": MICROBATCHES * size // (tp * pp * cp), "device": "cpu"},
            "advanced": {"engine": "reference"},
        }
    )
    mesh = Mesh.connect(Layout(dp=size // (tp * pp * cp), pp=pp, tp=tp, cp=cp), rank)
    run = build_run(config, mesh, objective=proof_objective(config))
    train_step(run, random_batches(config, 0, mesh.dp.rank, mesh.dp.size), 1e-3)
    forward, sum_over_ranks = Stage.forward, step.sum_over_ranks

    def slower(self, payload, batch):
        time.sleep(SLOW_S if rank == slow else 0)
        return forward(self, payload, batch)

    def later(*of):
        time.sleep(LATE_S)
        return sum_over_ranks(*of)

    Stage.forward, step.sum_over_ranks = slower, later
    batches = random_batches(config, 1, mesh.dp.rank, mesh.dp.size)
    run.watch.take()
    since = time.perf_counter()
    train_step(run, batches, 1e-3)
    whole = time.perf_counter() - since
    parts = run.watch.take()
    return {"whole": whole, "parts": parts, "mean": rank_metrics(parts, mesh, each=True)}


@pytest.mark.parametrize("slow", [0, 1])
def test_a_stage_waits_for_the_one_that_is_slow(slow):
    ranks = on_world(2, one_step, slow, 1, 2)
    least = SLOW_S * (MICROBATCHES - 1) / 2  # half of it: a busy machine takes the rest
    waited = [rank["parts"]["pp_wait"] for rank in ranks]
    computed = [rank["parts"]["compute"] for rank in ranks]
    assert computed[slow] - computed[1 - slow] > least and waited[1 - slow] > least + LATE_S and waited[slow] > LATE_S
    for rank in ranks:
        assert set(rank["parts"]) <= set(PARTS)
        assert sum(rank["parts"].values()) == pytest.approx(rank["whole"], rel=0.1, abs=0.02)
        assert rank["mean"]["time/pp_wait_s"] == pytest.approx(sum(waited) / 2)
        assert rank["mean"]["time/compute_s"] == pytest.approx(sum(computed) / 2)
        assert [rank["mean"][f"time/compute_s/rank{i}"] for i in (0, 1)] == computed
        assert rank["mean"]["memory/peak_gib"] == max(rank["mean"][f"memory/peak_gib/rank{i}"] for i in (0, 1)) > 0.05


def test_a_data_rank_waits_for_the_one_that_is_slow():
    ranks = on_world(2, one_step, 1)
    computed = [rank["parts"]["compute"] for rank in ranks]
    assert ranks[0]["parts"]["dp"] > SLOW_S * MICROBATCHES / 2 and computed[1] - computed[0] > SLOW_S * MICROBATCHES / 2
    assert not {"time/pp_wait_s", "time/tp_s"} & set(ranks[0]["mean"])  # there is one stage, and one tensor rank


@pytest.mark.parametrize("part, degrees", [("tp", (2, 1, 1)), ("cp", (1, 1, 2))])
def test_a_rank_waits_for_the_one_that_is_slow(part, degrees):
    ranks = on_world(2, one_step, 0, *degrees)
    computed = [rank["parts"]["compute"] for rank in ranks]
    assert ranks[1]["parts"][part] > SLOW_S * MICROBATCHES / 2 and computed[0] - computed[1] > SLOW_S * MICROBATCHES / 2
    for rank in ranks:
        assert sum(rank["parts"].values()) == pytest.approx(rank["whole"], rel=0.1, abs=0.02)


def test_a_lap_costs_next_to_nothing():
    watch, since = Stopwatch(), time.process_time()
    for _ in range(20_000):
        watch.lap("compute")
    assert (time.process_time() - since) / 20_000 < 1e-5
