"""What is done every so many steps: report, evaluate, show a sample, save. A list, in this order, called by the loop.

A duty is a function of the session and the step's report. All ranks call all duties: some are collective.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch

from roots_dist.accounting.flops import flops_per_step
from roots_dist.parallel.optim.lr_schedules import rate
from roots_dist.runs.evaluate.held_out import score_held_out
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.track.machine import peak_memory_gib
from roots_dist.runs.train.session import Session
from roots_dist.runs.train.step import StepReport
from roots_dist.storage.checkpoint.keep import prune
from roots_dist.storage.checkpoint.save import save
from roots_dist.world.mesh import Mesh
from roots_dist.world.stopwatch import PARTS

Callback = Callable[[Session, StepReport], None]

PROMPT_TOKENS, SAMPLE_TOKENS = 16, 48
SAMPLING = Sampling(0.8, top_p=0.95)


def due(session: Session, every: int) -> bool:
    """Every so many steps, and never at the end: what comes at the end is closing's business."""
    return every > 0 and session.step % every == 0 and session.step < session.config.train.steps


class Report:
    """Numbers of the step to the trackers. Times and speeds are means over the steps since the last report; what other
    duties take (evaluation, samples, checkpoints) is not in them."""

    def __init__(self, session: Session) -> None:
        self._step, self._tokens, self._seconds = session.step, session.tokens, 0.0
        self._parts: Counter[str] = Counter()
        self._watch = session.run.watch
        self.restart_clock()

    def restart_clock(self) -> None:
        """The next step begins now."""
        self._since = time.perf_counter()
        self._watch.take()

    def __call__(self, session: Session, report: StepReport) -> None:
        config, step = session.config, session.step
        self._seconds += time.perf_counter() - self._since
        self._parts.update(self._watch.take())
        if step % config.train.log_every and step < config.train.steps:
            return
        seconds, tokens = self._seconds, session.tokens - self._tokens
        per_step = seconds / (step - self._step)
        numbers = {
            "loss/train": report.loss,
            **({f"loss/train/{name}": value for name, value in report.terms.items()} if len(report.terms) > 1 else {}),
            "optim/lr": rate(config.optim, config.train.steps)(step - 1),
            "optim/grad_norm": report.grad_norm,
            **{f"optim/grad_norm/{group}": norm for group, norm in report.group_norms.items()},
            "data/tokens": float(session.tokens),
            "time/step_s": per_step,
            "time/left_s": per_step * (config.train.steps - step),
            "speed/tokens_per_s": tokens / seconds,
            **session.bounds.metrics(),
            **of_ranks(self._parts, session.mesh, config.advanced.track_ranks),
        }
        if config.train.nonfinite == "skip":
            numbers["train/skipped_steps"] = float(session.skipped)
        if session.peak_flops:
            flops = flops_per_step(config, tokens // config.data.seq_length)
            numbers["util/mfu_fraction"] = flops / seconds / session.peak_flops
        session.trackers.log(step, numbers)
        self._step, self._tokens, self._seconds = step, session.tokens, 0.0
        self._parts.clear()


def of_ranks(parts: Mapping[str, float], mesh: Mesh, each: bool = False) -> dict[str, float]:
    """The most memory that a rank has held, and what its seconds went to, the mean over ranks; with `each` both of every
    rank, so that a slow one is seen. On a GPU of making batches alone: for the rest it would have to be stopped and waited
    for. One message. Collective over the world."""
    alone = {name for name, axis in (("tp", mesh.tp), ("pp_wait", mesh.pp)) if axis.size == 1}
    names = ["data"] if mesh.device.type == "cuda" else [name for name in PARTS if name not in alone]
    rows = torch.zeros(mesh.world.size, 1 + len(names), dtype=torch.float64, device=mesh.device)
    mine = [peak_memory_gib(mesh.device), *(parts.get(name, 0.0) for name in names)]
    rows[mesh.world.rank] = torch.tensor(mine, dtype=torch.float64, device=mesh.device)
    (memory, *seconds) = mesh.world.sum_(rows).T.tolist()
    found = {"memory/peak_gib": max(memory), **{f"time/{n}_s": sum(s) / len(s) for n, s in zip(names, seconds)}}
    if each:
        found |= {f"memory/peak_gib/rank{rank}": value for rank, value in enumerate(memory)}
        found |= {f"time/{n}_s/rank{rank}": value for n, s in zip(names, seconds) for rank, value in enumerate(s)}
    return found


def evaluate(session: Session) -> None:
    """Held-out loss now, logged, and held against the best so far. Collective over the world."""
    if session.held_out is None:
        return
    sequences, run = session.config.train.eval_sequences, session.run
    since = time.perf_counter()
    with session.trackers.doing("evaluating ..."):
        found = score_held_out(run.passes, run.objective, session.held_out, sequences, session.bytes_per_token)
    metrics = found.metrics()
    session.trackers.log(session.step, {**metrics, "time/evaluate_s": time.perf_counter() - since})
    if session.best:
        session.best.note(session.step, metrics)


def sample(session: Session) -> None:
    """What the model makes of a held-out text, logged, if it writes. Collective over the world."""
    writes = WRITES.get(session.config.model.family)
    if writes is None or session.run.objective.words is None or session.held_out is None or session.tokenizer is None:
        return
    with session.trackers.doing("writing a sample of text ..."):
        given, said = map(session.tokenizer.decode, writes(session))
    session.trackers.text(session.step, "sample", f"{given} | {said}")


def _goes_on(session: Session) -> tuple[list[int], list[int]]:
    """A beginning, and how the model goes on."""
    length = min(PROMPT_TOKENS, session.config.data.seq_length // 2)
    beginning = _of_first_rank(session, next(session.held_out.evaluation(1)).tokens[0, :length])
    return beginning, _said(session, beginning, min(SAMPLE_TOKENS, session.config.data.seq_length - length), start=None)


def _answers(session: Session) -> tuple[list[int], list[int]]:
    """The first part of what an encoder reads, and what its decoder says to all of it."""
    batch = next(session.held_out.evaluation(1))
    text, (start, *_) = (_of_first_rank(session, row[0]) for row in (batch.tokens, batch.decoder_tokens))
    return text[:SAMPLE_TOKENS], _said(session, text, min(PROMPT_TOKENS, batch.decoder_tokens.shape[1]), start)


def _said(session: Session, text: list[int], count: int, start: int | None) -> list[int]:
    request = Request(count, SAMPLING, session.config.train.seed + session.step)
    ((answer,),) = decode(session.run.passes, [text], request, start=start, together=True)
    return answer.tokens


def _of_first_rank(session: Session, ids: torch.Tensor) -> list[int]:
    return session.mesh.dp.sum_(ids.to(session.mesh.device) * (session.mesh.dp.rank == 0)).tolist()


WRITES = {"gpt": _goes_on, "t5": _answers}
"""By family: what is given, and what the model says to it. Encoders write nothing."""


def checkpoint(session: Session) -> None:
    """Collective over the world. One that did best is marked before any other may go."""
    config, best = session.config.model_dump(mode="json"), session.best
    since = time.perf_counter()
    state = {"tokens": session.tokens, "skipped": session.skipped, "config": config, "best": best and best.saved()}
    with session.trackers.doing("saving ..."):
        path = save(session.folder, session.step, session.run.engine, session.run.params, session.mesh, state)
        if session.mesh.rank == 0:
            if best and best.step == session.step:
                best.mark(session.folder)
            prune(session.folder, session.config.checkpoint.keep)
    session.saved = session.step
    session.trackers.log(session.step, {"time/checkpoint_s": time.perf_counter() - since})
    session.trackers.checkpoint(session.step, path)


def callbacks(session: Session) -> list[Callback]:
    """In the order in which they are done."""
    report = Report(session)

    def every_so_often(session: Session, _: StepReport) -> None:
        config = session.config
        if due(session, config.train.eval_every):
            evaluate(session)
        if due(session, config.train.sample_every):
            sample(session)
        if due(session, config.checkpoint.every) or (
            session.best and session.best.step == session.step < config.train.steps
        ):
            checkpoint(session)
        report.restart_clock()

    return [report, every_so_often]
