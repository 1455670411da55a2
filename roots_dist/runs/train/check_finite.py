"""Check once per step, in one small message, that all numbers are finite, and find where the first bad one arose.

Gradients are judged by the norms that each rank took of its own, before any sum over ranks: after it, it is unknown
which rank had the nan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.parallel.zero.seam import Engine
from roots_dist.world.batch import Term
from roots_dist.world.mesh import Mesh
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
    squares: Sequence[float] | None = None
    """Square of the gradient's norm of each group of the optimizer, for `Engine.step`."""


class NonFinite(NamedTuple):
    where: str
    """Name of the tensor that is not finite, and the rank on which it arose."""
    in_weights: bool = False
    """True if a weight is not finite, which skipping steps cannot repair."""


def sum_over_ranks(
    mesh: Mesh, terms: list[Term], counts: Mapping[str, Tensor], engine: Engine, stop: int = 0
) -> StepSums:
    """Sum each term of the step and the norms of gradients over ranks, find the first number that is not finite, and
    share the signal to stop. counts: those of each term, equal on all ranks. `stop` is this rank's own signal.

    The result is equal on every rank, and read here in one wait. Collective over the world.
    """
    names = list(counts)
    sums = torch.zeros(len(names), dtype=torch.float64, device=mesh.device)
    if mesh.tp.rank == 0:  # a term is the same on each tensor rank of its stage: only one adds it
        for term in terms:
            sums[names.index(term.name)] += term.sum.double()
    loss_is_fine = torch.isfinite(sums).all()
    norms = engine.local_norms()
    gradients_are_fine = _all_finite([norm for _, norm in norms], mesh.device)
    squares = engine.squared_norms()
    row = torch.zeros(2 * len(names) + mesh.world.size, dtype=torch.float64, device=mesh.device)
    row[: len(names)] = torch.where(torch.isfinite(sums), sums, 0.0)
    if mesh.world.rank == 0:
        row[len(names) : 2 * len(names)] = torch.stack(list(counts.values()))
    bad_gradient = torch.where(gradients_are_fine, FINE, GRADIENT)
    row[2 * len(names) + mesh.world.rank] = torch.where(loss_is_fine, bad_gradient, LOSS) + STATES * stop
    numbers = mesh.world.sum_(row if squares is None else torch.cat([row, squares])).tolist()
    totals, counted = numbers[: len(names)], numbers[len(names) : 2 * len(names)]
    states = [divmod(int(number), STATES) for number in numbers[2 * len(names) : len(row)]]
    of_groups = None if squares is None else numbers[len(row) :]
    stop = max(stop for stop, _ in states)
    if not any(state for _, state in states):
        return StepSums(dict(zip(names, zip(totals, counted))), None, stop, of_groups)
    unknown = {name: (float("nan"), count) for name, count in zip(names, counted)}
    return StepSums(unknown, _where(mesh, engine, states[mesh.world.rank][1]), stop)


def _all_finite(norms: list[Tensor], device: torch.device) -> Tensor:
    """True if the numbers with these norms are finite. Norms judge, because clipping needs them: numbers too large to
    be squared fail too."""
    if not norms:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.isfinite(torch.stack(norms).double().sum())


def _kind(tensor: Tensor) -> str:
    return "is too large to be squared" if bool(torch.isfinite(tensor).all()) else "is not finite"


def _kind_of_gradient(gradient: Tensor | None, norm: Tensor) -> str:
    """gradient: None if it has been handed on, and only its norm is left."""
    if gradient is not None:
        return _kind(gradient)
    return "is not finite" if bool(torch.isnan(norm)) else "is infinite or too large to be squared"


def _where(mesh: Mesh, engine: Engine, state: int) -> NonFinite:
    """Name the deepest cause among all ranks. Backward runs from the model's end, so the last stage's last parameter
    comes first among gradients."""
    weights = engine.weights()
    bad = next((found for found in weights if not bool(torch.isfinite(found[1].norm()))), None)
    if bad:
        state, what = WEIGHT, f"weight {bad[0].name} {_kind(bad[1])}"
    elif state == GRADIENT:
        order = {p.name: i for i, (p, _) in enumerate(weights)}
        norms = sorted(engine.local_norms(), key=lambda found: -order.get(found[0].name, -1))
        bad = next(found for found in norms if not bool(torch.isfinite(found[1])))
        what = f"gradient of {bad[0].name} {_kind_of_gradient(bad[0].tensor.grad, bad[1])}"
    else:
        what = "loss is not finite" if state == LOSS else ""
    place = mesh.place
    rows = torch.zeros(mesh.world.size, 2, dtype=torch.int64, device=mesh.device)
    rows[mesh.world.rank] = torch.tensor([state, place.pp])
    told = mesh.world.sum_(rows).tolist()
    first = max(range(mesh.world.size), key=lambda rank: (*told[rank], -rank))
    where = words_of(mesh.world, first, f"{what} on rank {mesh.rank} ({place})", mesh.device)
    return NonFinite(where, in_weights=told[first][0] == WEIGHT)
