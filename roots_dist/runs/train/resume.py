"""Starting point of a run: the newest checkpoint of its folder, else the weights of another run, else random weights.

    folder --newest_verified--> step --refuse another model--> storage/checkpoint/load.py --> steps done; what changed
           --none, but signs of an earlier life--> stop

Rank 0 finds the checkpoint and compares its config; all ranks read it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from roots_dist.assembly.run import Run
from roots_dist.config.lr_schedules import LR_SCHEDULES, lr_schedule
from roots_dist.config.records import learning_rate_of
from roots_dist.config.schema import Config
from roots_dist.runs.track.metrics import METRICS_FILE, last_step
from roots_dist.runs.train.best_evaluation import BestEvaluation
from roots_dist.runs.train.earlier_life import begin_anew, refuse_silent_zero, refuse_to_leave_behind
from roots_dist.runs.train.init_weights import load_init_weights
from roots_dist.runs.train.left_out import forget_left_out, read_left_out
from roots_dist.storage.checkpoint.format import (
    STATE_FILE,
    Author,
    Manifest,
    checkpoints_folder,
    keep_at,
    read_json,
)
from roots_dist.storage.checkpoint.keep import remove_leftovers
from roots_dist.storage.checkpoint.load import load, load_initial_weights
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.run_identity import begin_attempt
from roots_dist.storage.checkpoint.same_model import (
    refuse_another_model,
    refuse_another_optimizer,
    refuse_other_bits,
)
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.storage.checkpoint.store_owner import claim, refuse_another_runs
from roots_dist.storage.checkpoint.verified import newest_verified, set_all_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """The progress of a run when it was resumed."""

    step: int = 0
    skipped: int = 0
    """Number of these steps that changed nothing."""
    best: Mapping[str, object] = field(default_factory=dict)
    """State of runs/train/best_evaluation.py."""
    author: Author = field(default=Author(), compare=False)
    """Author of the checkpoints; known on rank 0 alone."""
    spikes: Mapping[str, Any] = field(default_factory=dict)
    """State of runs/train/spikes.py."""


def resume(run: Run, folder: Path, order: str = "") -> ResumePoint:
    """Load the run's newest checkpoint that can be trusted, if checkpoint.resume is on; else load or draw initial
    weights. `order`: digest of what the order of samples depends on. Collective over the world.

    Raises CheckpointError if the folder has signs of an earlier life and no such checkpoint, or if
    checkpoint.fallback_folder has a later one.
    """
    mesh, begun = run.mesh, SharedFailure(run.mesh)
    if mesh.rank == 0:
        with begun.attempt(f"cannot use {folder}"):
            keep_at(folder, run.config.checkpoint.url)
            refuse_another_runs(folder, run.config.checkpoint.run_id, trains=True)
            if not run.config.checkpoint.resume:
                begin_anew(folder)
            elif checkpoints_folder(folder).is_dir():
                remove_leftovers(checkpoints_folder(folder))  # and restores what a killed save had moved aside
    begun.raise_on_all()
    keep_at(folder, run.config.checkpoint.url)
    found, damages = newest_verified(folder, mesh)
    step = -1
    if mesh.rank == 0:
        with begun.attempt(f"cannot use {folder}"):
            manifest = None if found is None else Manifest.read(found)
            if run.config.checkpoint.resume:
                refuse_to_leave_behind(folder, run.config.checkpoint.fallback_folder, manifest.step if manifest else 0)
            if found is None or manifest is None:
                refuse_silent_zero(folder, damages)
            else:
                step = manifest.step
                refuse_another_model(found, run.config)  # a ConfigError, of this rank alone
                refuse_other_bits(found, run.config, mesh.device.type)
                if step > 0:
                    refuse_another_optimizer(found, run.config)
                set_all_aside(damages)
                _remark(folder, step, manifest.author.order, order)
            if step <= 0:
                forget_left_out(folder)
    begun.raise_on_all()
    if found is None:
        if mesh.rank == 0 and (reached := last_step(folder / METRICS_FILE)) > 0:
            log.info("begins at step 0: it had ended after step %d, before its first checkpoint", reached)
        load_init_weights(run)
        return ResumePoint(author=_begin(run, folder, order))
    state = read_json(found / STATE_FILE)
    last = state["step"]
    author = _begin(run, folder, order)
    if last == 0:  # the folder of an import
        load_initial_weights(found, run.engine, run.params, mesh, verify=False)
        log.info("starts from %s", found)
        return ResumePoint(author=author)
    point = load_point(run, folder, found, author)
    changed = differences(state.get("config", {}), run.config)
    log.info("resumed after step %d%s", last, f" with {', '.join(changed)}" if changed else "")
    if line := rate_line(state.get("config", {}), run.config, last):
        log.info("%s", line)
    return point


def _begin(run: Run, folder: Path, order: str) -> Author:
    """Count this start of the run, on rank 0, and claim the place of its checkpoints."""
    if run.mesh.rank:
        return Author()
    author = begin_attempt(folder, order, run.config.checkpoint.run_id)
    claim(folder, author)
    return author


def load_point(run: Run, folder: Path, checkpoint: Place, author: Author = Author()) -> ResumePoint:
    """Load a verified checkpoint of the run in this folder. Collective over the world."""
    state = load(checkpoint, run.engine, run.params, run.mesh, verify=False)
    if run.mesh.rank == 0 and (state.get("best") or {}).get("step"):
        BestEvaluation(**state["best"]).mark_again(folder)  # it may be an older one if later checkpoints are gone
    left_out = read_left_out(folder, state.get("left_out", ()), run.mesh)
    spikes = {key: state[key] for key in ("losses", "norms", "spikes_in_a_row") if key in state}
    best = state.get("best") or {}
    return ResumePoint(state["step"], state.get("skipped", 0), best, author, spikes | {"left_out": left_out})


def rate_line(saved: Mapping[str, object], config: Config, last: int) -> str | None:
    """A line about a learning rate that jumps because the run's length or schedule has changed. None if it goes on
    smoothly, or if the saved schedule is of an extension, which is not run."""
    try:
        was = Config.from_record(saved)
    except ValidationError:
        return None  # of another version
    if last >= config.train.steps or was.optim.lr_schedule not in LR_SCHEDULES:
        return None
    rate = lr_schedule(was.optim, was.train.steps)
    ended, before, now = rate(last - 1), rate(last), learning_rate_of(config)(last)
    if abs(now - before) <= 1e-3 * max(now, before) and last < was.train.steps:
        return None
    return f"the learning rate of step {last + 1} is {now:.1e}; that of step {last} was {ended:.1e}"


def _remark(folder: Path, step: int, was: str, order: str) -> None:
    """Say what is not as the run had left it. Rank 0 calls it before the metrics are cut."""
    reached = last_step(folder / METRICS_FILE)
    if reached > step:
        log.info("steps %d to %d are done again: there is no checkpoint of them", step + 1, reached)
    if was and order and was != order:
        log.warning(
            "the samples are not in the order in which the checkpoint of step %d has read them: seed, sources, their "
            "weights or sizes, or the batch differ, and samples may be read twice or not at all",
            step,
        )


def differences(saved: Mapping[str, Mapping[str, object]], config: Config) -> list[str]:
    """One `optim.lr = 0.0002 (was 0.0003)` for each key whose value differs from the saved one."""
    return [
        f"{section}.{key} = {value} (was {saved[section][key]})"
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if key in saved.get(section, {}) and saved[section][key] != value
    ]
