"""Starting point of a run: the newest checkpoint of its folder, else the weights of another run, else random weights.

    folder --newest--> step --refuse another model--> storage/checkpoint/load.py --> steps done; log what has changed

Rank 0 finds the checkpoint and compares its config; all ranks read it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from pydantic import ValidationError

from roots_dist.assembly.run import Run
from roots_dist.config.init_from import FREE
from roots_dist.config.records import objective_of
from roots_dist.config.rope_scaling import LongRope
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.runs.train.best_evaluation import BestEvaluation
from roots_dist.runs.train.init_weights import load_init_weights
from roots_dist.storage.checkpoint.format import STATE_FILE, Manifest, checkpoints_folder, read_json, step_name
from roots_dist.storage.checkpoint.keep import BEST_FILE, newest, remove_leftovers
from roots_dist.storage.checkpoint.load import load, load_initial_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """How far a run had come when it was resumed."""

    step: int = 0
    skipped: int = 0
    """Number of these steps that changed nothing."""
    best: Mapping[str, object] = field(default_factory=dict)
    """State of runs/train/best_evaluation.py."""


def resume(run: Run, folder: Path) -> ResumePoint:
    """Load the run's newest checkpoint if there is one and checkpoint.resume is on; else load or draw initial weights.
    Collective over the world."""
    mesh = run.mesh
    if mesh.rank == 0 and not run.config.checkpoint.resume:
        set_aside(folder)
    step = torch.full((1,), -1, dtype=torch.int64, device=mesh.device)
    if mesh.rank == 0 and run.config.checkpoint.resume:
        remove_leftovers(
            checkpoints_folder(folder)
        )  # restores a checkpoint that was moved aside when a save was killed
        found = newest(folder)
        if found is not None:
            step[0] = Manifest.read(found).step
            refuse_another_model(found, run.config)
    step += 1  # other ranks add 0: only rank 0 has looked, because they may see files of a shared folder late
    last = int(mesh.world.sum_(step * (mesh.rank == 0)).item()) - 1
    if last < 0:
        load_init_weights(run)
        return ResumePoint()
    checkpoint = checkpoints_folder(folder) / step_name(last)
    if last == 0:  # the folder of an import
        load_initial_weights(checkpoint, run.engine, run.params, mesh)
        log.info("starts from %s", checkpoint)
        return ResumePoint()
    state = load(checkpoint, run.engine, run.params, mesh)
    if mesh.rank == 0 and (state.get("best") or {}).get("step"):
        BestEvaluation(**state["best"]).mark(folder)  # it may be an older one if later checkpoints are gone
    changed = differences(state.get("config", {}), run.config)
    log.info("resumed after step %d%s", last, f" with {', '.join(changed)}" if changed else "")
    return ResumePoint(last, state.get("skipped", 0), state.get("best") or {})


def set_aside(folder: Path) -> None:
    """Rename the folder of checkpoints of a run that is not resumed: those of later steps would be taken for the new
    run's newest."""
    checkpoints = checkpoints_folder(folder)
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        return
    number = next(i for i in count(1) if not checkpoints.with_name(f"{checkpoints.name}.{i}").exists())
    checkpoints.rename(checkpoints.with_name(f"{checkpoints.name}.{number}"))
    (folder / BEST_FILE).unlink(missing_ok=True)
    log.info("starts from scratch; the earlier checkpoints are in %s.%d", checkpoints, number)


def refuse_another_model(checkpoint: Path, config: Config) -> None:
    """Raise ConfigError if the checkpoint's model computes another function. Weights of equal shapes may: fewer but
    wider heads, other positions, another activation."""
    try:
        was = _resolved(Config.model_validate(read_json(checkpoint / STATE_FILE)["config"]))
    except (KeyError, ValidationError):
        return  # written by another program or version: names and shapes are still compared by load()
    now = _resolved(config)
    problems = [
        _model_problem(key, now[key], was[key], checkpoint, config)
        for key in now
        if key in was and now[key] != was[key]
    ]
    if problems:
        raise ConfigError(problems)


def _model_problem(key: str, value: object, was: object, checkpoint: Path, config: Config) -> Problem:
    where = f"in {checkpoint}, from which the run would resume"
    restart = "choose another track.folder, or start from scratch with checkpoint.resume=false"
    if key == "model.max_positions" and config.model.max_positions is None:
        expected = f"{was}, the number of learned positions {where}"
        shorter = (
            f"set model.max_positions={was} for shorter samples, " if config.data.seq_length < int(str(was)) else ""
        )
        return Problem(key="data.seq_length", found=value, expected=expected, fix=f"set it back, {shorter}{restart}")
    return Problem(key=key, found=value, expected=f"{was} as {where}", fix=f"set it back, {restart}")


def _resolved(config: Config) -> dict[str, object]:
    """What determines the function of a model with given weights: model.* with its defaults filled in, and other
    keys."""
    m = config.model
    filled = {"kv_heads": m.num_kv_heads(), "head_dim": m.width_of_head(), "ffn": m.width_of_ffn()}
    found: dict[str, object] = {f"model.{key}": value for key, value in {**m.model_dump(), **filled}.items()}
    found |= {"advanced.norm_eps": config.advanced.norm_eps, "advanced.float64": config.advanced.float64}
    if objective_of(config).has_labels:
        found["finetune.labels"] = config.finetune.labels  # a head of as many other labels fits too
    if config.finetune.strategy == "lora":
        found["finetune.lora_alpha"] = config.finetune.lora_alpha
    if isinstance(m.rope_scaling, LongRope):  # it has two functions
        long = config.data.seq_length > m.rope_scaling.original_length
        found["data.seq_length beyond model.rope_scaling.original_length"] = long
    if m.positions == "learned":
        found["model.max_positions"] = m.max_positions or config.data.seq_length
    return {key: value for key, value in found.items() if key not in FREE}


def differences(saved: Mapping[str, Mapping[str, object]], config: Config) -> list[str]:
    """One `optim.lr = 0.0002 (was 0.0003)` for each key whose value differs from the saved one."""
    return [
        f"{section}.{key} = {value} (was {saved[section][key]})"
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if key in saved.get(section, {}) and saved[section][key] != value
    ]
