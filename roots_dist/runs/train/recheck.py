"""Compute a microbatch of each data rank again on its neighbour, in an exact run: loss and gradients must have the same
bits there (train.recheck_every).

    data rank r: its own microbatch, then that of rank r - 1 --digests--> compared over dp --> equal, or the first
                                                                          parameter and the ranks

copies.py finds numbers that have changed where they are kept. A processor that computes a wrong number now and then
leaves all copies equal, because its gradient is summed before it is copied. Here each microbatch is computed on two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roots_dist.assembly.run import Run
from roots_dist.cluster_profile import format_ranges
from roots_dist.config.records import schedule_of
from roots_dist.config.schema import Config
from roots_dist.errors import UserError, present
from roots_dist.runs.train.copies import digest
from roots_dist.runs.train.expert_load import without_counting
from roots_dist.runs.train.state import TrainState
from roots_dist.runs.train.step import count_targets, on_device, scales
from roots_dist.schedule.schedules import problem
from roots_dist.world.batch import MicroBatch
from roots_dist.world.sharding import ensure_grad
from roots_dist.world.words import words_of


class MicrobatchDiffers(UserError):
    """Two data ranks have computed other bits from one microbatch."""


def recheck(state: TrainState) -> None:
    """Compute the last step's first microbatch of each data rank, with the weights of now, there and on the next data
    rank. Raises MicrobatchDiffers on every rank if loss or gradients have other bits. Collective over the world."""
    run, step = state.run, state.step - 1
    dp = run.mesh.dp
    if dp.size == 1:
        return
    left_out, number = state.spikes.samples_left_out(step), _least_microbatches(run.config)
    before = state.training.of_data_rank((dp.rank - 1) % dp.size)
    mine, theirs = (batches.at(step, left_out)[:number] for batches in (state.training, before))
    compare(run, state.step, mine, theirs)


def _least_microbatches(config: Config) -> int:
    """The least number of microbatches that the schedule takes; that of a step is one that it does."""
    p, number = config.parallel, 1
    while problem(schedule_of(config), p.pp, number, p.virtual_stages) is not None:
        number += 1
    return number


def compare(run: Run, step: int, mine: list[MicroBatch], theirs: list[MicroBatch]) -> None:
    """Compute this data rank's microbatches and those of the one before, and compare what each has computed with what
    the next one has. Collective over the world."""
    dp = run.mesh.dp
    factors = scales(run, count_targets(run, mine))
    table = torch.zeros(dp.size, 2, 1 + len(run.params), dtype=torch.int64, device=run.mesh.device)
    for which, batches in enumerate((mine, theirs)):
        table[dp.rank, which] = _digests(run, batches, factors)
    dp.sum_(table)
    differs = torch.ne(table[:, 0], table[:, 1].roll(-1, 0))  # of rank r: what it has computed, and rank r + 1
    if run.mesh.world.sum_(differs.any().to(torch.int64)):
        raise MicrobatchDiffers(f"step {step}: {_who(run, differs)}")


def _digests(run: Run, batches: list[MicroBatch], factors: dict[str, Tensor]) -> Tensor:
    """Digests of the terms of the loss, and of each parameter's gradient on this rank: int64 [1 + parameters]."""
    exact = present(run.passes.model.tp.exact)
    exact.begin(len(batches) * exact.data_shards)  # all of them are of the first data shard
    with without_counting(run):
        terms = run.passes.forward_backward(on_device(run, batches), factors)
    exact.collect(run.params)
    nothing = torch.zeros((), dtype=torch.int64, device=run.mesh.device)
    gradients = [digest(ensure_grad(p)) if p.tensor.requires_grad else nothing for p in run.params]
    run.engine.zero_grad()
    return torch.stack([sum((digest(term.sum) for term in terms), nothing), *gradients])


def _who(run: Run, differs: Tensor) -> str:
    """The first gradient with other bits in the order of backward passes, and the data ranks with their ranks."""
    mesh = run.mesh
    rows = torch.zeros(mesh.world.size, dtype=torch.int64, device=mesh.device)
    rows[mesh.world.rank] = differs.any()
    seen = mesh.world.sum_(rows).nonzero().flatten().tolist()[-1]  # the last stage computes its gradients first
    found = differs.any(0).nonzero().flatten().tolist()
    names = [p.name for p in run.params]
    what = "the loss" if found == [0] else f"the gradient of {names[found[-1] - 1]}" if found else ""
    what = words_of(mesh.world, seen, what, mesh.device)
    pairs = torch.zeros(mesh.dp.size, dtype=torch.int64, device=mesh.device)
    if mesh.world.rank == seen:
        pairs += differs.any(1)
    wrong = mesh.world.sum_(pairs).nonzero().flatten().tolist()
    return _said(what, wrong, [_ranks_of(run, data) for data in range(mesh.dp.size)])


def _ranks_of(run: Run, data: int) -> list[int]:
    layout = run.mesh.layout
    return [rank for rank in range(layout.world_size) if layout.place(rank).dp == data]


def _said(what: str, pairs: Sequence[int], ranks: Sequence[Sequence[int]]) -> str:
    """Words about the data ranks whose microbatch had other bits on the next one. ranks: those of each data rank."""
    number = len(ranks)
    common = set.intersection(*({pair, (pair + 1) % number} for pair in pairs))
    named = sorted(common if len(common) == 1 else {rank for pair in pairs for rank in (pair, (pair + 1) % number)})
    theirs = sorted(rank for data in named for rank in ranks[data])
    told = f"data rank{'s' * (len(named) > 1)} {format_ranges(named)}"
    told += f" (rank{'s' * (len(theirs) > 1)} {format_ranges(theirs)})"
    verb = "computes other bits than its neighbours" if len(named) == 1 else "compute other bits"
    return (
        f"{told} {verb} from one microbatch, first in {what}. Fix: leave out the node of them that is at fault, and "
        "resume from a checkpoint of before"
    )
