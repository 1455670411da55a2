"""A model of a few hundred numbers, and its checkpoints, made in milliseconds in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from roots_dist.assembly.run import Run, build_run
from roots_dist.config.schema import Config
from roots_dist.storage.checkpoint.save import save
from roots_dist.world.mesh import Mesh

CONFIG = Config.model_validate(
    {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 29},
        "data": {"seq_length": 8},
        "train": {"global_batch": 1, "device": "cpu"},
    }
)


def small_run(config: Config = CONFIG) -> Run:
    return build_run(config, Mesh.single())


def save_step(run: Run, folder: Path, step: int) -> Path:
    """Save a checkpoint whose weights tell its step: all of the first parameter are `step`."""
    folder.mkdir(exist_ok=True)
    first = run.params[0].name
    state = run.engine.read_state(first)
    run.engine.write_state(first, state | {"weight": torch.full_like(state["weight"], float(step))})
    state = {"tokens": 8 * step, "skipped": 0, "config": run.config.model_dump(mode="json"), "best": None}
    return save(folder, step, run.engine, run.params, run.mesh, state)


def step_of_weights(run: Run) -> float:
    """The step that the weights tell."""
    weight = run.engine.read_state(run.params[0].name)["weight"]
    assert bool((weight == weight.flatten()[0]).all()), "weights of two steps are mixed"
    return float(weight.flatten()[0])
