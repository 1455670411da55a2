"""What a run takes at least, held against published runs and by hand. tests/runs/test_runs.py holds it against real
ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from roots_dist.accounting.bounds import GIB, Bounds, bounds
from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.schedule.schedules import SCHEDULES

CONFIGS = Path(__file__).parents[2] / "configs"


def bound_of(config: Config, layout: Layout, peak_flops: float | None) -> Bounds:
    return bounds(config, layout, flops_per_step(config), peak_flops)


def test_bloom_took_more_than_is_possible_and_less_than_three_times_as_much():
    """384 A100 (312 TFLOP/s), TP4 × PP12 × DP8: 105 s per step at 2,048 samples, and 80 GB of memory per GPU."""
    bound = bound_of(load(CONFIGS / "bloom-176b.yaml"), Layout(dp=8, pp=12, tp=4), 384 * 312e12)
    assert 105 / 3 < bound.step_s < 105 and bound.memory_gib * GIB < 80e9


@pytest.mark.parametrize(
    "schedule, pp, bubble", [("1f1b", 1, 0.0), ("1f1b", 4, 3 / 8), ("gpipe", 2, 1 / 8), ("zb-h1", 4, 1 / 8)]
)
def test_a_pipeline_adds_its_bubble(schedule, pp, bubble):
    config = Config.model_validate(
        {"model": {"layers": 4}, "parallel": {"pp": pp, "schedule": schedule}, "train": {"global_batch": 8}}
    )
    bound = bound_of(config, Layout(pp=pp), 1e12)
    assert bound.step_s == pytest.approx(flops_per_step(config) / 1e12 * (1 + bubble))


def test_a_schedule_without_a_closed_form_promises_no_bubble(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "zb-h1", replace(SCHEDULES["zb-h1"], bubble_time=None))
    config = Config.model_validate({"parallel": {"pp": 4, "schedule": "zb-h1"}, "train": {"global_batch": 8}})
    assert bound_of(config, Layout(pp=4), 1e12).step_s == pytest.approx(flops_per_step(config) / 1e12)


def test_without_a_peak_there_is_no_time_and_adapters_promise_less():
    config = Config.model_validate({"train": {"global_batch": 4}})
    unknown = bound_of(config, Layout(), None)
    assert unknown.step_s is None and "plan/step_s" not in unknown.metrics()
    tuned = bound_of(config.changed({"finetune.strategy": "lora"}), Layout(), 1e12)
    whole = bound_of(config, Layout(), 1e12)
    assert tuned.step_s == pytest.approx(whole.step_s / 3) and tuned.memory_gib < whole.memory_gib / 2
