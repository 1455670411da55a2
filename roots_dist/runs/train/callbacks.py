"""Callbacks of the training loop: report metrics, evaluate, write a sample of text, save a checkpoint (saving.py).

A callback is a function of the training state and the step's report; the list below has their order. All ranks call all
callbacks, because some are collective.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from socket import gethostname

import torch

from roots_dist.accounting.flops import mfu
from roots_dist.config.records import family_of, learning_rate_of
from roots_dist.errors import present
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.runs.evaluate.held_out import AT_A_TIME, score_held_out
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.track.machine_facts import peak_memory_gib
from roots_dist.runs.track.metrics import LOADS
from roots_dist.runs.train.copies import check_copies
from roots_dist.runs.train.expert_load import expert_loads, load_metrics
from roots_dist.runs.train.recheck import recheck
from roots_dist.runs.train.saving import checkpoint, poll
from roots_dist.runs.train.slow_ranks import SlowRanks
from roots_dist.runs.train.state import TrainState
from roots_dist.runs.train.step import StepReport
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh
from roots_dist.world.stopwatch import PARTS

log = logging.getLogger(__name__)

Callback = Callable[[TrainState, StepReport], None]

PROMPT_TOKENS, SAMPLE_TOKENS = 16, 48
SAMPLING = Sampling(0.8, top_p=0.95)


def is_due(state: TrainState, every: int) -> bool:
    """True if something that is done every so many steps is done after this step. False after the last step, where
    runs/train/loop.py evaluates, samples and saves by itself."""
    return every > 0 and state.step % every == 0 and state.step < state.config.train.steps


class ReportMetrics:
    """Log the metrics of a step. Times and speeds are means over the steps since the last report, without the time of
    evaluation, samples and checkpoints."""

    def __init__(self, state: TrainState, first: Sequence[Callback] = ()) -> None:
        """`first` are called before the report of each step; what they log is shown with it, and their time is not that
        of the step."""
        self._first = tuple(first)
        self._step, self._tokens, self._seconds = state.step, state.tokens, 0.0
        self._parts: Counter[str] = Counter()
        self._watch = state.run.watch
        self._slow = SlowRanks(state.mesh.layout)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start timing the next step now."""
        self._since = time.perf_counter()
        self._watch.take()

    def __call__(self, state: TrainState, report: StepReport) -> None:
        config, step = state.config, state.step
        self._seconds += time.perf_counter() - self._since
        self._parts.update(self._watch.take())
        for callback in self._first:
            callback(state, report)
        if step % config.train.log_every and step < config.train.steps:
            return
        seconds, tokens = self._seconds, state.tokens - self._tokens
        per_step = seconds / (step - self._step)
        numbers = {
            "loss/train": report.loss,
            **({f"loss/train/{name}": value for name, value in report.terms.items()} if len(report.terms) > 1 else {}),
            "optim/lr": learning_rate_of(config)(step - 1),
            "optim/grad_norm": report.grad_norm,
            **{f"optim/grad_norm/{group}": norm for group, norm in report.group_norms.items()},
            "data/tokens": float(state.tokens),
            "time/step_s": per_step,
            "time/left_s": per_step * (config.train.steps - step),
            "speed/tokens_per_s": tokens / seconds,
            **state.bounds.metrics(),
            **rank_metrics(self._parts, state.mesh, config.advanced.track_ranks, self._slow, step - self._step),
        }
        rules = (config.train.spike_threshold, config.train.norm_spike_threshold)
        if config.train.nonfinite == "skip" or any(rules):
            numbers["train/skipped_steps"] = float(state.skipped)
        if state.spikes.left_out:
            numbers["train/left_out_samples"] = float(state.spikes.samples_left_out(step))
        if state.peak_flops:
            flops = flops_per_step(config, tokens // config.data.seq_length)
            numbers["util/mfu_fraction"] = mfu(flops, seconds, state.peak_flops)
        if loads := expert_loads(state.run):
            numbers |= load_metrics(loads)
            state.trackers.record(step, LOADS, json.dumps(loads))
        state.trackers.log(step, numbers)
        self._step, self._tokens, self._seconds = step, state.tokens, 0.0
        self._parts.clear()


def rank_metrics(
    parts: Mapping[str, float], mesh: Mesh, each: bool = False, slow: SlowRanks | None = None, steps: int = 1
) -> dict[str, float]:
    """Peak memory over ranks and mean seconds per part of the step; with `each` also both for every rank. A rank that
    `slow` finds to be slow says so; `parts` are of that many `steps`.

    On a GPU only the wait for batches is timed: timing the other parts would need a synchronization. Sends one
    message. Collective over the world.
    """
    axes = (("tp", mesh.tp), ("cp", mesh.cp), ("ep", mesh.ep), ("pp_wait", mesh.pp))
    not_split = {name for name, axis in axes if axis.size == 1}
    names = ["data"] if mesh.device.type == "cuda" else [name for name in PARTS if name not in not_split]
    rows = torch.zeros(mesh.world.size, 1 + len(names), dtype=torch.float64, device=mesh.device)
    mine = [peak_memory_gib(mesh.device), *(parts.get(name, 0.0) for name in names)]
    rows[mesh.world.rank] = torch.tensor(mine, dtype=torch.float64, device=mesh.device)
    (memory, *seconds) = mesh.world.sum_(rows).T.tolist()
    found = {"memory/peak_gib": max(memory), **{f"time/{n}_s": sum(s) / len(s) for n, s in zip(names, seconds)}}
    if slow is not None:
        step_s = sum(parts.values()) / steps
        mean = {name: [seconds / steps for seconds in of_ranks] for name, of_ranks in zip(names, seconds)}
        for rank, (own, median) in slow.note(mean, step_s).items():
            text = (
                "this rank (%d, node %s) is slow: computing and batches take %.3g s a step, on most of its stage %.3g s"
            )
            log.log(logging.WARNING if rank == mesh.rank else logging.DEBUG, text, rank, gethostname(), own, median)
    if each:
        found |= {f"memory/peak_gib/rank{rank}": value for rank, value in enumerate(memory)}
        found |= {f"time/{n}_s/rank{rank}": value for n, s in zip(names, seconds) for rank, value in enumerate(s)}
    return found


class Stopped(Exception):
    """A rank was told to stop: the checkpoint comes before the rest of the evaluation."""


def _until_stopped(state: TrainState) -> Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]]:
    """Ask all ranks before the microbatches of each forward pass whether one of them was told to stop; raises Stopped
    on all if so. To ask makes the host wait."""

    def asked(batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
        for number, batch in enumerate(batches):
            if number % (AT_A_TIME * state.mesh.pp.size) == 0 and state.stop.agree(state.mesh):
                raise Stopped
            yield batch

    return asked


def evaluate(state: TrainState) -> Mapping[str, float]:
    """Score the held-out text, log the metrics, update the best evaluation, and return the metrics; none without a
    held-out text, or if a rank is told to stop meanwhile. Collective over the world."""
    if state.held_out is None:
        return {}
    sequences, run = state.config.train.eval_sequences, state.run
    since = time.perf_counter()
    with state.trackers.doing("evaluating ..."), state.mesh.progress.during("evaluation"):
        try:
            found = score_held_out(
                run.passes, run.objective, state.held_out, sequences, state.bytes_per_token, _until_stopped(state)
            )
        except Stopped:
            return {}
    metrics = found.metrics()
    state.trackers.log(state.step, {**metrics, "time/evaluate_s": time.perf_counter() - since})
    if state.best:
        state.best.note(state.step, metrics)
    for callback in state.on_evaluation:
        callback(state, metrics)
    return metrics


def sample(state: TrainState) -> None:
    """Log a sample of text that the model generates from held-out text, if it can generate. Collective over the
    world."""
    writes = WRITERS.get(family_of(state.config).stacks)
    if (
        writes is None
        or state.run.objective.perplexity_term is None
        or state.held_out is None
        or state.tokenizer is None
    ):
        return
    with state.trackers.doing("writing a sample of text ..."), state.mesh.progress.during("sample"):
        prompt, answer = map(state.tokenizer.decode, writes(state))
    state.trackers.text(state.step, "sample", f"{prompt} | {answer}")


def _continue_text(state: TrainState) -> tuple[list[int], list[int]]:
    """Beginning of a held-out text, and the model's continuation."""
    length = min(PROMPT_TOKENS, state.config.data.seq_length // 2)
    beginning = _from_first_rank(state, next(present(state.held_out).evaluation(1)).tokens[0, :length])
    return beginning, _generate(state, beginning, min(SAMPLE_TOKENS, state.config.data.seq_length - length), start=None)


def _answer_text(state: TrainState) -> tuple[list[int], list[int]]:
    """First tokens of an encoder's input, and the decoder's answer to all of it."""
    batch = next(present(state.held_out).evaluation(1))
    answer = present(batch.decoder_tokens)
    text, (start, *_) = (_from_first_rank(state, row[0]) for row in (batch.tokens, answer))
    return text[:SAMPLE_TOKENS], _generate(state, text, min(PROMPT_TOKENS, answer.shape[1]), start)


def _generate(state: TrainState, text: list[int], count: int, start: int | None) -> list[int]:
    request = Request(count, SAMPLING, state.config.train.seed + state.step)
    ((answer,),) = decode(state.run.passes, [text], request, start=start, together=True)
    return answer.tokens


def _from_first_rank(state: TrainState, ids: torch.Tensor) -> list[int]:
    return state.mesh.dp.sum_(ids.to(state.mesh.device) * (state.mesh.dp.rank == 0)).tolist()


WRITERS = {"decoder": _continue_text, "encoder-decoder": _answer_text}
"""Kind of stack -> function that returns a prompt and the model's answer. Encoders cannot write."""


def check_ranks_if_due(state: TrainState) -> None:
    """Compare the copies of weights and moments every advanced.check_copies_every steps (the last step's are compared
    by the save), and what two ranks compute from one microbatch every train.recheck_every steps. Collective over the
    world."""
    if is_due(state, state.config.advanced.check_copies_every):
        check_copies(state.run, state.step)
    if is_due(state, state.config.train.recheck_every):
        recheck(state)


def callbacks(state: TrainState, on_step: Sequence[Callback] = ()) -> list[Callback]:
    """Callbacks in the order in which they run. Those of `on_step` run before the step is reported."""
    report = ReportMetrics(state, on_step)

    def every_so_often(state: TrainState, _: StepReport) -> None:
        config = state.config
        if state.stop.agreed:
            return  # runs/train/loop.py saves at once
        poll(state)
        check_ranks_if_due(state)
        if is_due(state, config.train.eval_every):
            evaluate(state)
        if is_due(state, config.train.sample_every) and not state.stop.agree(state.mesh):
            sample(state)
        if state.stop.agreed:
            return
        is_best = state.best and state.best.step == state.step < config.train.steps
        again = state.saves.next_try == state.step < config.train.steps
        if is_due(state, config.checkpoint.every) or is_best or again:
            checkpoint(state)
        report.restart_clock()

    return [report, every_so_often]
