"""Go back to the newest checkpoint after a spike, and leave out all samples that were read since, as PaLM was trained
(Chowdhery et al. 2022, section 5.1): what came before a spike may have led to it.

    spike in step s --RUN/rewinds.json--> load the checkpoint of step c --> steps c + 1, … read what follows step s

Nothing of the steps in between is left, in weights, moments, windows or metrics, so that it makes no difference whether
the run went back or was killed and went on from the file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from roots_dist.config.batch_ramp import samples_before
from roots_dist.config.schema import Config
from roots_dist.runs.train.best_evaluation import best_evaluation
from roots_dist.runs.train.left_out import write_left_out
from roots_dist.runs.train.resume import load_point
from roots_dist.runs.train.saving import settle
from roots_dist.runs.train.spikes import FIX, MOST, Spikes, SpikesError
from roots_dist.runs.train.state import Saves, TrainState
from roots_dist.storage.checkpoint.format import STATE_FILE, read_json
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.storage.checkpoint.verified import newest_verified, set_all_aside

log = logging.getLogger(__name__)


def spikes_of(config: Config, saved: Mapping[str, Any]) -> Spikes:
    """The spikes of a run that goes on from what a checkpoint has saved of them."""
    rules = config.train
    return Spikes(rules.spike_threshold, **saved, norm_threshold=rules.norm_spike_threshold)


def rewind(state: TrainState, why: str) -> bool:
    """Go back because of the step that has just been done. Returns whether there was a checkpoint to go back to; if not
    nothing is changed. Collective over the world.

    Raises SpikesError if it is the third time for one checkpoint.
    """
    mesh, run, folder, spike = state.mesh, state.run, state.folder, state.step
    state.step = spike - 1  # nothing has changed since: if the last attempt at a save is due now, it is of that step
    settle(state)  # it is of a step before the spike
    state.step = spike
    with mesh.progress.during("resume"):
        found, damages = newest_verified(folder, mesh)
        step = 0 if found is None else read_json(found / STATE_FILE)["step"]
        if found is None or step == 0:  # the folder of an import has no moments
            return False
        begins = [first for first, _ in state.spikes.left_out].count(step)
        if begins == MOST - 1:
            raise SpikesError(f"step {state.step}: {why}; the third after the checkpoint of step {step}. Fix: {FIX}.")
        samples = samples_before(state.config.train, state.step) - samples_before(state.config.train, step)
        samples += sum(count for first, count in state.spikes.left_out if first > step)  # passed over since that step
        left_out = (*(one for one in state.spikes.left_out if one[0] <= step), (step, samples))
        noted = SharedFailure(mesh)
        if mesh.rank == 0:
            with noted.attempt(f"cannot note in {folder} that samples are left out"):
                write_left_out(folder, left_out)
                set_all_aside(damages)
        if failed := noted.words():
            log.warning("%s; if the run is killed before its next checkpoint, it has to find this spike again", failed)
        log.warning(
            "step %d: %s; the run goes on from the checkpoint of step %d, without the %d samples that it read since",
            state.step, why, step, samples,
        )  # fmt: skip
        point = load_point(run, folder, found)
    state.step, state.skipped = point.step, point.skipped
    state.best = best_evaluation(state.config, point.best)
    state.spikes = spikes_of(state.config, {**point.spikes, "left_out": left_out})
    was, sound = state.saves, {one for one in state.saves.verified if one <= point.step}
    state.saves = Saves(point.step, was.author, sound, was.failures, background=was.background, copies=was.copies)
    return True
