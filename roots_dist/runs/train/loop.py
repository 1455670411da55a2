"""`roots train`, from a live mesh to a trained model: the file to read first.

config + mesh --build--> Run --resume--> step, callbacks, step, callbacks … --evaluate, sample, save--> closing lines
                                             a signal --stop_signal.py--> save
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from roots_dist.accounting.bounds import bounds
from roots_dist.assembly.run import build_run
from roots_dist.checks.facts import words_of
from roots_dist.checks.remarks import remarks
from roots_dist.config.records import learning_rate_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.layout import Layout
from roots_dist.learning.data.ahead import BatchesAhead
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.learning.objectives import make_objective
from roots_dist.learning.objectives.task_checks import row_remarks
from roots_dist.logs import still_busy
from roots_dist.parallel.zero.build import build_engine
from roots_dist.parallel.zero.seam import Engine
from roots_dist.runs.evaluate.references import with_references
from roots_dist.runs.plan.at_start import planned_bytes
from roots_dist.runs.ranks.stop_signal import (
    ENDED,
    FAILED,
    FINISHED,
    FOLDER_GONE,
    STOPPED,
    StopSignal,
    catch_stop_signals,
    read_end,
    record_end,
    record_failure,
)
from roots_dist.runs.track.closing_lines import closing_lines
from roots_dist.runs.track.summary_file import write_summary
from roots_dist.runs.track.trackers import open_trackers
from roots_dist.runs.train.banner import banner, peak_of_devices
from roots_dist.runs.train.best_evaluation import best_evaluation
from roots_dist.runs.train.callbacks import Callback, callbacks, evaluate, sample
from roots_dist.runs.train.origin import without_secrets, write_origin
from roots_dist.runs.train.repeats import note_failure, noting_failures
from roots_dist.runs.train.resume import resume
from roots_dist.runs.train.rewind import rewind, spikes_of
from roots_dist.runs.train.run_folder import HeldFolder, folder_gone, hold_folder
from roots_dist.runs.train.saving import finishing_saves, move_it, save_elsewhere, save_last
from roots_dist.runs.train.state import OnCheckpoint, OnEvaluation, TrainState
from roots_dist.runs.train.step import StepReport, train_step
from roots_dist.storage.checkpoint.object_store import place_of
from roots_dist.world.batch import MicroBatch, Objective
from roots_dist.world.mesh import Mesh

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainParts:
    """The functions that the loop calls. A proof replaces some of them, and so observes the loop itself instead of
    a copy of it."""

    make_objective: Callable[[Config], Objective] = make_objective
    make_engine: Callable[..., Engine] = build_engine
    """Called with (config, mesh, module, params, trainable, ties)."""
    peak_of_devices: Callable[[Config, Mesh], float | None] = peak_of_devices
    on_step: tuple[Callback, ...] = ()
    """Called on every rank after each step and before the run's own callbacks, so that what they log is shown with the
    step."""
    on_evaluation: tuple[OnEvaluation, ...] = ()
    on_checkpoint: tuple[OnCheckpoint, ...] = ()
    after_step: tuple[Callback, ...] = ()
    """Called on every rank after each step and after the run's own callbacks."""


def train(config: Config, mesh: Mesh, parts: TrainParts = TrainParts()) -> int:
    """Train, and return the exit code: 0, or 128 + the signal that stopped the run. All files are written under
    track.folder. Collective over the world."""
    config = without_secrets(config)
    folder = Path(config.track.folder)
    with (
        hold_folder(folder) if mesh.rank == 0 else nullcontext() as held,
        record_failure(folder, f"rank {mesh.rank} ({mesh.place})", rank0=mesh.rank == 0),
        noting_failures(folder, config, mesh.progress),
        catch_stop_signals(folder) as stop,
    ):
        return train_in(folder, config, mesh, stop, parts, held)


def open_run(folder: Path, config: Config, mesh: Mesh, parts: TrainParts = TrainParts()) -> TrainState:
    """Open the data, build the model and load the newest checkpoint of the folder, or draw the first weights. Nobody is
    told yet: the trackers are empty. From here on a hang is told in the folder. Collective over the world."""
    mesh.progress.on_hang = lambda text: _end_of_hang(folder, config, mesh.progress.step, text)
    objective = parts.make_objective(config)
    training = Batches.open(
        config, objective, config.data.train, mesh.dp.rank, mesh.dp.size, packed=config.finetune.packing
    )
    validation = config.data.validation
    held_out = Batches.open(config, objective, validation, mesh.dp.rank, mesh.dp.size) if validation else None
    tokenizer = load_codec(config.data.tokenizer) if config.data.tokenizer else None
    run = build_run(config, mesh, parts.make_engine, objective)
    with mesh.progress.during("resume"):
        start = resume(run, folder, training.order_digest)
    if objective_of(config).has_references:
        sources = training.sources + (held_out.sources if held_out else [])
        compared = with_references(run.passes, objective, sources, folder, start.step)
        training = training.with_sources(compared[: len(config.data.train)])
        held_out = held_out.with_sources(compared[len(config.data.train) :]) if held_out else None
    peak = parts.peak_of_devices(config, mesh)
    return TrainState(
        config=config,
        run=run,
        folder=folder,
        training=training,
        held_out=held_out,
        tokenizer=tokenizer,
        peak_flops=peak,
        bounds=bounds(config, mesh.layout, flops_per_step(config), peak),
        best=best_evaluation(config, start.best),
        step=start.step,
        skipped=start.skipped,
        spikes=spikes_of(config, start.spikes),
        author=start.author,
        background=mesh.for_background() if config.saves_in_background() else None,
        on_evaluation=parts.on_evaluation,
        on_checkpoint=parts.on_checkpoint,
    )


def _end_of_hang(folder: Path, config: Config, step: int, text: str) -> None:
    record_end(folder, f"{FAILED}: {text}")
    note_failure(folder, config, step, text)


def train_in(
    folder: Path, config: Config, mesh: Mesh, stop: StopSignal, parts: TrainParts, held: HeldFolder | None = None
) -> int:
    """Train in a folder that rank 0 holds. Collective over the world."""
    rank0 = mesh.rank == 0
    with still_busy("opening the run") if rank0 else nullcontext():
        state = open_run(folder, config, mesh, parts)
    state.stop = stop
    run, first = state.run, state.step
    facts = write_origin(folder, config, mesh.layout, state.bounds.facts()) if rank0 else None
    said = [*remarks(config, mesh.layout, words_of(config)), *row_remarks(config, run.objective)] if rank0 else []
    if log.isEnabledFor(logging.INFO):  # on rank 0, while the others begin to evaluate
        planned = planned_bytes(config, mesh.layout)
        log.info("\n".join([banner(config, mesh, state.peak_flops, state.bounds, planned), *said]))

    def begin() -> tuple[Callback, ...]:
        """Open the trackers after the step that the run is at. Returns what is called after each step."""
        state.trackers = open_trackers(config, folder, rank0=rank0, resumed_step=state.step, facts=facts)
        return (*callbacks(state, parts.on_step), *parts.after_step)

    with ExitStack() as closing:
        closing.callback(lambda: state.trackers.close())
        after_step = begin()
        closing.enter_context(finishing_saves(state))
        stop.began = True
        if first == 0 and not stop.agree(mesh):
            evaluate(state)
        learning_rate = learning_rate_of(config)
        pinned = mesh.device.type == "cuda"
        made = BatchesAhead(state.batches_at, last=config.train.steps - 1, pinned=pinned)
        closing.callback(made.close)
        while state.should_continue and not stop.agreed:
            step = state.step
            if held and not held.is_there():
                stop.signal = FOLDER_GONE
            report = take_step(state, made.at, learning_rate(step))
            if report.is_rewound:
                state.trackers.close()
                after_step = begin()
                continue
            for callback in after_step:
                callback(state, report)
        if not stop.agreed and first < state.step == config.train.steps:
            evaluate(state)
        if stop.agreed:  # the launcher may kill us in seconds: the checkpoint comes before anything else
            return stop_early(state)
        if first < state.step:
            save_last(state)
            sample(state)
        else:
            log.info("%s", state.reason_to_stop())
    if rank0:
        elsewhere = f"; {move_it(state, state.saves.elsewhere)}" if state.saves.elsewhere else ""
        record_end(folder, f"{FINISHED} after step {state.step}{elsewhere}")
    return 0


def take_step(state: TrainState, batches_at: Callable[[int], list[MicroBatch]], lr: float) -> StepReport:
    """Take the next step of a run, and note in its state what became of it. `batches_at` gives this data rank's
    microbatches of a step. Collective over the world."""
    mesh, step = state.mesh, state.step
    mesh.progress.phase, mesh.progress.step = "step", step + 1
    batches = batches_at(step)
    state.run.watch.lap("data")
    spikes = state.spikes
    report = train_step(state.run, batches, lr, state.stop.signal, spikes.loss.limit, spikes.norm.limit)
    state.step, state.stop.agreed = step + 1, report.stop
    if report.is_spike and state.config.train.on_spike == "rewind" and rewind(state, present(report.skipped)):
        return replace(report, is_rewound=True)
    spikes.note(state.step, report.loss, report.is_spike, bool(report.skipped), report.grad_norm)
    if report.skipped:
        state.skipped += 1
        level = logging.WARNING if mesh.rank == 0 else logging.DEBUG
        log.log(level, "step %d is skipped: %s", state.step, report.skipped)
    return report


def stop_early(state: TrainState) -> int:
    """Save a checkpoint, say why the run ends, and return its exit code. Collective over the world."""
    folder, number = state.folder, state.stop.agreed
    if number == FOLDER_GONE:
        fallback = state.config.checkpoint.fallback_folder
        saved = "nothing of it is saved elsewhere: checkpoint.fallback_folder is not set"
        if state.saves.under_way is not None:
            state.saves.under_way.wait()  # it fails, and no rank reads a folder that is not there
        if fallback is not None:
            saved = f"the last step is in {save_elsewhere(state, place_of(fallback))}"
        raise folder_gone(folder, saved)
    save_last(state)
    ended = f"{STOPPED} by {signal.Signals(number).name} after step {state.step}"
    if state.saves.elsewhere:
        ended = f"{ended}; {move_it(state, state.saves.elsewhere)}"
        log.info("%s, and the same command resumes from it", ended)
    elif state.saves.step or state.step:
        log.info("%s, with a checkpoint; the same command resumes from it", ended)
    else:
        log.info("%s", ended)
    if state.mesh.rank == 0:
        record_end(folder, ended)
    return 128 + number


def close_run(config: Config, layout: Layout) -> None:
    """Draw and print what a finished run has to show. Rank 0 calls it when no other rank waits for it any more; what
    fails here is said, and the run is finished all the same."""
    folder = Path(config.track.folder)
    if not read_end(folder / ENDED).startswith(FINISHED):
        return
    try:
        write_summary(config, layout, folder)
        closing_lines(config, folder)
    except Exception as error:  # matplotlib, a full disk, a terminal that has gone
        log.warning("the run is finished, and its checkpoint saved, but its summary is not complete: %s", error)
