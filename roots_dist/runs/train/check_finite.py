"""Check once per step, in one small message, that all numbers are finite, and find where the first bad one arose.

Called by runs/train/step.py between backward and the reduction over data ranks: after the reduction it is unknown which
rank had the nan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.world.batch import Term
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param
from roots_dist.world.words import words_of

FINE, GRADIENT, LOSS, WEIGHT = range(4)
"""State of a rank; a larger number is a deeper cause: a bad weight makes a bad loss, which makes bad gradients."""
STATES = 4


class StepSums(NamedTuple):
    """Result of the check, equal on all ranks."""

    sums: dict[str, tuple[float, float]]
    """Sum and count of each term."""
    nonfinite: NonFinite | None
    stop: int = 0
    """Signal that told a rank to stop (runs/ranks/stop_signal.py); 0 if there was none."""


class NonFinite(NamedTuple):
    where: str
    """Which tensor is not finite, and on which rank: where it arose."""
    in_weights: bool = False
    """Whether a weight is not finite, which skipping steps cannot repair."""


def sum_over_ranks(
    mesh: Mesh, terms: list[Term], counts: Mapping[str, Tensor], params: list[Param], stop: int = 0
) -> StepSums:
    """Sum each term of the step over ranks, find the first number that is not finite, and share the signal to stop.
    counts: those of each term, equal on all ranks. `stop` is this rank's own signal.

    The result is equal on every rank, and read here in one wait. Collective over the world.
    """
    names = list(counts)
    sums = torch.zeros(len(names), dtype=torch.float64, device=mesh.device)
    if mesh.tp.rank == 0:  # a term is the same on each tensor rank of its stage: only one adds it
        for term in terms:
            sums[names.index(term.name)] += term.sum.double()
    loss_is_fine = torch.isfinite(sums).all()
    gradients_are_fine = _all_finite([p.tensor.grad for p in params if p.tensor.grad is not None], mesh.device)
    row = torch.zeros(2 * len(names) + mesh.world.size, dtype=torch.float64, device=mesh.device)
    row[: len(names)] = torch.where(torch.isfinite(sums), sums, 0.0)
    if mesh.world.rank == 0:
        row[len(names) : 2 * len(names)] = torch.stack(list(counts.values()))
    bad_gradient = torch.where(gradients_are_fine, FINE, GRADIENT)
    row[2 * len(names) + mesh.world.rank] = torch.where(loss_is_fine, bad_gradient, LOSS) + STATES * stop
    numbers = mesh.world.sum_(row).tolist()
    totals, counted = numbers[: len(names)], numbers[len(names) : 2 * len(names)]
    states = [divmod(int(number), STATES) for number in numbers[2 * len(names) :]]
    stop = max(stop for stop, _ in states)
    if not any(state for _, state in states):
        return StepSums(dict(zip(names, zip(totals, counted))), None, stop)
    unknown = {name: (float("nan"), count) for name, count in zip(names, counted)}
    return StepSums(unknown, _where(mesh, params, states[mesh.world.rank][1]), stop)


def _all_finite(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Whether all tensors are finite, judged by their norms, because clipping needs those: numbers too large to be
    squared fail too."""
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.isfinite(torch.stack(torch._foreach_norm(tensors)).double().sum())


def _nonfinite_kind(tensor: torch.Tensor) -> str:
    return "is too large to be squared" if bool(torch.isfinite(tensor).all()) else "is not finite"


def _where(mesh: Mesh, params: list[Param], state: int) -> NonFinite:
    """Name the deepest cause among all ranks. Backward runs from the model's end, so the last stage's last parameter
    comes first among gradients."""
    bad = next((p for p in params if not bool(_all_finite([p.tensor.data], mesh.device))), None)
    if bad:
        state, what = WEIGHT, f"weight {bad.name} {_nonfinite_kind(bad.tensor.data)}"
    elif state == GRADIENT:
        gradients = [(p, p.tensor.grad) for p in reversed(params) if p.tensor.grad is not None]
        bad, gradient = next(found for found in gradients if not bool(_all_finite([found[1]], mesh.device)))
        what = f"gradient of {bad.name} {_nonfinite_kind(gradient)}"
    else:
        what = "loss is not finite" if state == LOSS else ""
    place = mesh.place
    rows = torch.zeros(mesh.world.size, 2, dtype=torch.int64, device=mesh.device)
    rows[mesh.world.rank] = torch.tensor([state, place.pp])
    told = mesh.world.sum_(rows).tolist()
    first = max(range(mesh.world.size), key=lambda rank: (*told[rank], -rank))
    where = words_of(mesh.world, first, f"{what} on rank {mesh.rank} ({place})", mesh.device)
    return NonFinite(where, in_weights=told[first][0] == WEIGHT)
