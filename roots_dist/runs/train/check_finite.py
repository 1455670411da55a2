"""Is every number of this step finite, and if not, where did it begin? Asked once per step, in one small message.

Called by runs/train/step.py between backward and the reduction over data ranks: afterwards nobody knows whose nan it
was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from roots_dist.world.batch import Term
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param

FINE, GRADIENT, LOSS, WEIGHT = range(4)
"""What is wrong on a rank, the deeper cause the larger: a bad weight makes a bad loss makes bad gradients."""
STATES = 4

_TEXT = 400  # bytes of a message between ranks


class StepSums(NamedTuple):
    """What all ranks know of a step."""

    sums: dict[str, float]
    nonfinite: NonFinite | None
    stop: int = 0
    """The signal that told a rank to stop (runs/train/stop_signal.py); 0: none."""


class NonFinite(NamedTuple):
    where: str
    """What is not finite on which rank: where it began."""
    in_weights: bool = False
    """Then no step that is skipped will mend it."""


def sum_over_ranks(mesh: Mesh, terms: list[Term], names: Sequence[str], params: list[Param], stop: int = 0) -> StepSums:
    """The step's sum of each term, and where the first number that is not finite stands, or None; and whether a rank is
    told to stop (stop: this one, by which signal).

    Equal on every rank. Collective over the world.
    """
    sums = torch.zeros(len(names), dtype=torch.float64, device=mesh.device)
    if mesh.tp.rank == 0:  # a term is the same on each tensor rank of its stage: one of them speaks
        for term in terms:
            sums[names.index(term.name)] += term.sum.double()
    loss_is_fine = torch.isfinite(sums).all()
    gradients_are_fine = _all_finite([p.tensor.grad for p in params if p.tensor.grad is not None], mesh.device)
    row = torch.zeros(len(names) + mesh.world.size, dtype=torch.float64, device=mesh.device)
    row[: len(names)] = torch.where(torch.isfinite(sums), sums, 0.0)
    bad_gradient = torch.where(gradients_are_fine, FINE, GRADIENT)
    row[len(names) + mesh.world.rank] = torch.where(loss_is_fine, bad_gradient, LOSS) + STATES * stop
    numbers = mesh.world.sum_(row).tolist()
    totals, said = numbers[: len(names)], [divmod(int(number), STATES) for number in numbers[len(names) :]]
    stop = max(stop for stop, _ in said)
    if not any(state for _, state in said):
        return StepSums(dict(zip(names, totals)), None, stop)
    return StepSums(dict.fromkeys(names, float("nan")), _where(mesh, params, said[mesh.world.rank][1]), stop)


def _all_finite(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """By their norms, which clipping needs: of numbers too large to be squared there is none."""
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.isfinite(torch.stack(torch._foreach_norm(tensors)).double().sum())


def _nonfinite_kind(tensor: torch.Tensor) -> str:
    return "is too large to be squared" if bool(torch.isfinite(tensor).all()) else "is not finite"


def _where(mesh: Mesh, params: list[Param], state: int) -> NonFinite:
    """Every rank looks; the deepest cause is named. Backward runs from the model's end, so among gradients the last
    stage and its last parameter come first."""
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
    said = f"{what} on rank {mesh.rank} ({place})".encode()[:_TEXT]
    rows = torch.zeros(mesh.world.size, 2 + _TEXT, dtype=torch.int64, device=mesh.device)
    rows[mesh.world.rank, 0] = state
    rows[mesh.world.rank, 1] = place.pp
    rows[mesh.world.rank, 2 : 2 + len(said)] = torch.tensor(list(said), device=mesh.device)
    mesh.world.sum_(rows)
    first = max(range(mesh.world.size), key=lambda r: (rows[r, 0].item(), rows[r, 1].item(), -r))
    where = bytes(rows[first, 2:].tolist()).rstrip(b"\0").decode(errors="replace")
    return NonFinite(where, in_weights=rows[first, 0].item() == WEIGHT)
