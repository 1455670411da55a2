"""Going on from the newest checkpoint of the run's folder: found by rank 0, held against the config, read by all.

    folder --newest--> step --refuse another model--> checkpoint/load.py --> steps done, and what has changed is said
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from roots_dist.checkpoint.format import STATE_FILE, Manifest, checkpoints_folder, read_json, step_name
from roots_dist.checkpoint.keep import newest, sweep
from roots_dist.checkpoint.load import load
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.train.build import Run

log = logging.getLogger(__name__)

MAY_CHANGE = ("model.dropout", "model.attention_dropout", "model.init_std")
"""Keys of model.* that do not say which function the weights are of."""


def resume(run: Run, folder: Path) -> tuple[int, int]:
    """Load the run's newest checkpoint, if there is one and it is wanted. Collective over the world.

    Returns how many steps have been done, and how many of them were skipped.
    """
    mesh = run.mesh
    step = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    if mesh.rank == 0 and run.config.checkpoint.resume:
        sweep(checkpoints_folder(folder))  # gives a checkpoint its name back that was set aside when a save was killed
        found = newest(folder)
        if found is not None:
            step[0] = Manifest.read(found).step
            refuse_another_model(found, run.config)
    last = int(mesh.world.sum_(step).item())  # rank 0 has looked; the others may see a shared folder late
    if last == 0:
        return 0, 0
    state = load(checkpoints_folder(folder) / step_name(last), run.engine, run.params, mesh)
    changed = differences(state.get("config", {}), run.config)
    log.info("resumed after step %d%s", last, f" with {', '.join(changed)}" if changed else "")
    return last, state.get("skipped", 0)


def refuse_another_model(checkpoint: Path, config: Config) -> None:
    """Weights may fit and mean another function: fewer heads of more width, other positions, another activation."""
    try:
        was = _resolved(Config.model_validate(read_json(checkpoint / STATE_FILE)["config"]))
    except (KeyError, ValidationError):
        return  # not the trainer's, or another version's: names and shapes will still be compared
    problems = [
        Problem(
            key=key,
            found=value,
            expected=f"{was[key]} as in {checkpoint}, from which the run would go on",
            fix="set it back, choose another track.folder, or begin anew with checkpoint.resume=false",
        )
        for key, value in _resolved(config).items()
        if key in was and value != was[key]
    ]
    if problems:
        raise ConfigError(problems)


def _resolved(config: Config) -> dict[str, object]:
    """What a model computes from its weights: model.* with its defaults filled in, and what else it depends on."""
    m = config.model
    filled = {"kv_heads": m.num_kv_heads(), "head_dim": m.width_of_head(), "ffn": m.width_of_ffn()}
    found: dict[str, object] = {f"model.{key}": value for key, value in {**m.model_dump(), **filled}.items()}
    found |= {"advanced.norm_eps": config.advanced.norm_eps, "advanced.double": config.advanced.double}
    if m.positions == "learned":
        found["data.seq"] = config.data.seq
    return {key: value for key, value in found.items() if key not in MAY_CHANGE}


def differences(saved: Mapping[str, Mapping[str, object]], config: Config) -> list[str]:
    """`optim.lr = 0.0002 (was 0.0003)` for each key that another value was saved of."""
    return [
        f"{section}.{key} = {value} (was {saved[section][key]})"
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if key in saved.get(section, {}) and saved[section][key] != value
    ]
