"""A run saved in one layout and engine goes on in another as if nothing had happened."""

from pathlib import Path

import pytest

from roots_dist.assembly.run import build_run
from roots_dist.config.lr_schedules import lr_schedule
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.runs.train.step import train_step
from roots_dist.storage.checkpoint.load import load
from roots_dist.storage.checkpoint.save import save
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.world.mesh import Mesh

SAVED, STEPS = 2, 4
BASE = Config.model_validate(
    {
        "model": {"layers": 4, "hidden": 16, "heads": 4, "kv_heads": 2, "vocab": 29, "init_std": 0.1, "dropout": 0.1},
        "data": {"seq_length": 8},
        "train": {"global_batch": 4, "micro_batch": 1, "steps": STEPS},
        "optim": {"lr": 1e-2, "warmup_steps": 3},
        "advanced": {"vocab_multiple": 8},
    }
)


def changed(double: bool, **parallel) -> Config:
    return BASE.changed({f"parallel.{name}": value for name, value in parallel.items()} | {"advanced.float64": double})


def losses(rank: int, size: int, config: Config, first: int, folder: str, do_save: bool) -> list[float]:
    """Losses of the steps from `first` on; saved after SAVED steps, or loaded before `first`."""
    p = config.parallel
    mesh = Mesh.connect(Layout(dp=size // (p.tp * p.pp), pp=p.pp, tp=p.tp), rank)
    run = build_run(config, mesh)
    at = lr_schedule(config.optim, config.train.steps)
    if first:
        found = sorted(Path(folder, "checkpoints").iterdir())
        assert load(found[-1], run.engine, run.params, mesh)["step"] == first
    report = []
    for step in range(first, STEPS):
        batches = random_batches(config, step, mesh.dp.rank, mesh.dp.size)
        report.append(train_step(run, batches, at(step)).loss)
        if do_save and step + 1 == SAVED:
            save(Path(folder), step + 1, run.engine, run.params, mesh, {}, shard_bytes=5000)
    return report


CASES = {
    "float64: TP2 × PP2 to one process": (True, 4, {"tp": 2, "pp": 2}, 1, {}),
    "float64: one process to PP4": (True, 1, {}, 4, {"pp": 4}),
    "float64: PP2, interleaved, to TP4": (
        True,
        2,
        {"pp": 2, "virtual_stages": 2, "schedule": "interleaved"},
        4,
        {"tp": 4},
    ),
    "ZeRO-1 on TP2 × DP2 to ZeRO-3 on DP2": (False, 4, {"tp": 2, "zero_stage": 1}, 2, {"zero_stage": 3}),
    "ZeRO-3 on DP2 to TP2 × PP2": (False, 2, {"zero_stage": 3}, 4, {"tp": 2, "pp": 2}),
    "ZeRO-2 on DP4 to one process": (False, 4, {"zero_stage": 2}, 1, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_in_another_layout(case, tmp_path):
    double, size_before, before, size_after, after = CASES[case]
    world = on_warm_world if double else on_world  # DeepSpeed leaves globals behind
    straight = world(size_before, losses, changed(double, **before), 0, str(tmp_path), True, timeout=250)[0]
    resumed = world(size_after, losses, changed(double, **after), SAVED, str(tmp_path), False, timeout=250)[0]
    assert resumed == pytest.approx(straight[SAVED:], rel=1e-10 if double else 3e-6)
    assert straight[0] != pytest.approx(straight[-1], rel=1e-3)
