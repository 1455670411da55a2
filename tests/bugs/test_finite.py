"""Numbers that are not finite: named where they began, left out or refused, and without a trace in what comes after."""

import math

import pytest
import torch

from roots_dist.assembly.run import Run, build_run
from roots_dist.config.schema import Config
from roots_dist.errors import NotFiniteError
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.runs.train.step import train_step
from roots_dist.storage.checkpoint.load import load
from roots_dist.storage.checkpoint.save import save
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh

CONFIG = Config.model_validate(
    {
        "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 29, "init_std": 0.1},
        "data": {"seq_length": 8},
        "train": {"global_batch": 2, "nonfinite": "skip"},
        "advanced": {"float64": True},
    }
)
LR = 1e-3


def a_run(**changes: object) -> Run:
    return build_run(CONFIG.changed({key.replace("__", "."): value for key, value in changes.items()}), Mesh.single())


def poison(run: Run, name: str, value: float) -> torch.utils.hooks.RemovableHandle:
    """Every gradient that autograd adds to a parameter's becomes this value: that of the first microbatch does. What a
    product adds by itself, of which autograd sees None, is left as it is."""
    (tensor,) = (p.tensor for p in run.params if p.name == name)
    return tensor.register_hook(lambda gradient: None if gradient is None else torch.full_like(gradient, value))


def step(run: Run, number: int):
    return train_step(run, random_batches(run.config, number, 0, 1), LR)


def test_a_gradient_too_large_to_be_squared_is_named_like_an_infinite_one():
    """Its norm is infinite though no entry is: the rank that looked for an entry died, and the others waited for it."""
    run = a_run(advanced__float64=False)
    poison(run, "blocks.1.mlp.up.weight", 1e30)
    assert "gradient of blocks.1.mlp.up.weight is too large to be squared on rank 0" in step(run, 0).skipped


def test_a_norm_that_overflows_is_not_taken_for_a_step():
    """Each parameter's norm is finite, their sum of squares is not: no step was taken, and nobody said so."""
    run = a_run()
    for name in ("blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"):
        poison(run, name, 1e153)
    before = [p.tensor.clone() for p in run.params]
    report = step(run, 0)
    assert "gradient" in report.skipped and math.isnan(report.grad_norm)
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, run.params))
    stopping = a_run(train__nonfinite="stop")
    for name in ("blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"):
        poison(stopping, name, 1e153)
    with pytest.raises(NotFiniteError, match="step 1: .* Fix: lower optim.lr"):
        step(stopping, 0)


def test_a_bad_weight_stops_the_run_even_where_steps_may_be_skipped():
    """Else it would skip every step to its end, and overwrite the last good checkpoint."""
    run = a_run()
    (weight,) = (p.tensor for p in run.params if p.name == "blocks.0.norm1.weight")
    with torch.no_grad():
        weight[3] = math.nan
    with pytest.raises(NotFiniteError, match="step 1: weight blocks.0.norm1.weight is not finite .* cannot repair"):
        step(run, 0)


def test_a_run_with_a_skipped_step_resumes_where_it_was(tmp_path):
    """Adam's bias correction counts steps that were taken; a resumed run counted the skipped ones too."""
    straight = a_run()
    for number in range(4):
        hook = poison(straight, "head.norm.weight", math.inf) if number == 0 else None
        report = step(straight, number)
        assert bool(report.skipped) == (number == 0)
        if hook:
            hook.remove()
        if number == 1:
            save(tmp_path, 2, straight.engine, straight.params, straight.mesh, {"skipped": 1})
    resumed = a_run()
    load(tmp_path / "checkpoints" / "step_00000002", resumed.engine, resumed.params, resumed.mesh)
    for number in (2, 3):
        step(resumed, number)
    for a, b in zip(straight.params, resumed.params):
        assert torch.equal(a.tensor, b.tensor), a.name


def left_out(rank: int, size: int) -> dict:
    """Three steps on two ranks; in the second, rank 1's part of one matrix has an infinite gradient."""
    config = CONFIG.changed({"parallel.tp": 2, "parallel.sequence_parallel": True})
    run = build_run(config, Mesh.connect(Layout(tp=2), rank))
    said = []
    for number in range(3):
        hook = poison(run, "blocks.0.mlp.down.weight", math.inf) if (rank, number) == (1, 1) else None
        said.append(train_step(run, random_batches(config, number, 0, 1), LR).skipped)
        if hook:
            hook.remove()
    return {"said": said, "copies": [p.tensor.detach() for p in run.params if p.spec.shard_dim is None]}


def test_all_ranks_leave_a_step_out_that_is_bad_on_one():
    """BLOOM-176B's copies drifted for weeks because not all ranks did the same."""
    first, second = on_world(2, left_out)
    bad = "gradient of blocks.0.mlp.down.weight is not finite on rank 1 (pp0 dp0 tp1)"
    assert first["said"] == second["said"] == [None, bad, None]
    assert all(torch.equal(a, b) for a, b in zip(first["copies"], second["copies"]))
