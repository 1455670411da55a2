"""The bits of a run, to compare layouts of an exact one (train.exact): a digest of every number after every step.

trace_bits(rank, size, config, …) on each rank --merge_bits--> one dict for each step: what -> digest
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roots_dist.assembly.run import Run, build_run
from roots_dist.checks.checks import layout_for
from roots_dist.config.records import learning_rate_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.runs.ranks.join import device_for
from roots_dist.runs.train.step import StepReport, train_step
from roots_dist.storage.checkpoint.format import checkpoints_folder, step_name
from roots_dist.storage.checkpoint.load import load
from roots_dist.storage.checkpoint.save import save
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param

Bits = dict[str, str]
"""Name of a value (loss, a slice of a parameter's weight or moment) -> digest."""


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def bits_of(run: Run) -> Bits:
    """Digests of weights and moments, in slices that every layout of the run holds whole. Collective over dp."""
    degree = present(run.config.train.exact).tensor
    found: Bits = {}
    for p in run.params:
        state = run.engine.read_state(p.name)
        for where, index in _pieces(p, degree):
            found |= {f"{p.name}{where} ({kind})": digest(tensor[index]) for kind, tensor in state.items()}
    return found


def bits_of_step(run: Run, report: StepReport) -> Bits:
    """Digests of all that a step has computed. Collective over dp."""
    numbers = {"loss": report.loss, "gradient norm": report.grad_norm}
    return {what: value.hex() for what, value in numbers.items()} | bits_of(run)


def _pieces(p: Param, degree: int) -> list[tuple[str, tuple[slice, ...]]]:
    """Slices of this rank's slice, with their places in the whole parameter in words."""
    dim = p.spec.shard_dim
    if dim is None:
        return [("", (slice(None),))]
    size = p.spec.shape[dim] // math.gcd(p.spec.shape[dim], degree)
    held = p.slices[dim]
    return [
        (f"[{start}:{start + size}]", (slice(None),) * dim + (slice(start - held.start, start - held.start + size),))
        for start in range(held.start, held.stop, size)
    ]


def trace_bits(
    rank: int,
    size: int,
    config: Config,
    first: int,
    last: int,
    load_from: str | None = None,
    save_to: str | None = None,
) -> dict[str, Any]:
    """Run steps first … last-1 on one rank, on made-up texts, and return the digests after each of them. load_from,
    save_to: folders of runs."""
    mesh = Mesh.connect(layout_for(config, size), rank, device_for(config, rank))
    objective = proof_objective(config)
    batches = Batches(config, objective, [objective.open("random")], [1.0], mesh.dp.rank, mesh.dp.size)
    run = build_run(config, mesh, objective=objective)
    if load_from:
        load(checkpoints_folder(Path(load_from)) / step_name(first), run.engine, run.params, mesh)
    learning_rate = learning_rate_of(config)
    steps = [bits_of_step(run, train_step(run, batches.at(step), learning_rate(step))) for step in range(first, last)]
    if save_to:
        if mesh.rank == 0:
            Path(save_to).mkdir(parents=True, exist_ok=True)
        save(Path(save_to), last, run.engine, run.params, mesh, {})
    return {"steps": steps}


def merge_bits(ranks: Sequence[Mapping[str, Any]]) -> list[Bits]:
    """The digests of each step. What two ranks hold with other bits is named by both digests."""
    merged: list[Bits] = [{} for _ in ranks[0]["steps"]]
    for rank in ranks:
        for step, found in zip(merged, rank["steps"]):
            for what, bits in found.items():
                before = step.setdefault(what, bits)
                step[what] = before if before == bits else f"{before} or {bits}"
    return merged


def first_difference(a: Sequence[Bits], b: Sequence[Bits]) -> str | None:
    """The first step and number with other bits; None if there is none."""
    for i, (ours, theirs) in enumerate(zip(a, b, strict=True)):
        for what in {**ours, **theirs}:
            if ours.get(what) != theirs.get(what):
                return f"step {i}: {what}"
    return None
