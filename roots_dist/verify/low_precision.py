"""Proof of a layout in bf16, where rounding is larger than many a bug: its distance from the truth may not exceed that
of one process.

    truth = float64 in one process --distance of each tensor, over seeds--> bf16 layout ≤ RATIO × bf16 in one process
          --the experts of each token: choices.py--> both

Rounding moves a layout and one process equally far, in different directions; a bug moves the layout alone. With few
numbers in a tensor a ratio is uncertain, so seeds are added until each is below the bound or SEEDS are used up. Copies
on other ranks must be equal to the bit in any dtype.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from roots_dist.testing.parity import Difference, Trace, merge
from roots_dist.verify.choices import Counted, choices_of
from roots_dist.verify.proof import Proof
from roots_dist.verify.proofs import Place, describe, in_one_process, started
from roots_dist.verify.shrink import SmallConfig

RATIO = 1.3
"""Largest distance of the layout from the truth, in units of one process' distance."""
RATIO_OF_ZEROS = 3.0
"""The same for parameters whose gradient is zero but for rounding, as that of key biases: nothing of it is signal, and
every message in bf16 rounds once more."""
ZERO = 1e-9
"""Share of the norm of all gradients in float64 below which a parameter's gradient is zero."""
SEEDS = (3, 6, 12, 24, 48)
"""Numbers of seeds after which the ratios are looked at."""
KINDS = ("loss", "gradients", "weights", "exp_avg", "exp_avg_sq")


def prove_in_bf16(small: SmallConfig) -> Proof:
    """Compare the distances of a layout in bf16, over as many seeds as are needed."""
    layout: dict[tuple[str, str], float] = defaultdict(float)
    alone: dict[tuple[str, str], float] = defaultdict(float)
    copies: dict[str, float] = {}
    zeros: set[str] | None = None
    rows: list[Difference] = []
    counted = Counted()
    with tempfile.TemporaryDirectory(prefix="roots-verify-") as folder:
        place = Place(Path(folder))
        config = started(small, place)
        for number in range(SEEDS[-1]):
            seeded = config.changed({"train.seed": config.train.seed + number})
            single = in_one_process(seeded, micro_batch=config.train.micro_batch)  # as much is rounded to bf16 as there
            exact = single.changed({"train.precision": "fp32", "advanced.float64": True})
            true = place.traces(exact, 1, f"truth-{number}", {})
            choices, truth = choices_of(true), merge(true)
            in_layout = place.traces(seeded, small.ranks, f"layout-{number}", choices)
            in_one = place.traces(single, 1, f"alone-{number}", choices)
            counted.add(in_layout, in_one)
            found = merge(in_layout)
            of_truth = zero_gradients(truth)
            zeros = of_truth if zeros is None else zeros & of_truth
            _add(layout, _squares(found, truth))
            _add(alone, _squares(merge(in_one), truth))
            for where, value in found.disagreement.items():
                copies[f"{where}, seed {number}"] = math.inf if math.isnan(value) else value
            if number + 1 in SEEDS:
                rows = [_row(kind, layout, alone, zeros) for kind in KINDS]
                rows += [_row_of_zeros(layout, alone, zeros)] if zeros else []
                if all(row.passed for row in rows):
                    break
    worst = max(copies, key=lambda where: copies[where], default="none")
    rows.append(Difference("copies on other ranks", copies.get(worst, 0.0), 0.0, worst))
    notes = small.notes
    if config.model.num_expert_layers():
        rows.insert(0, counted.row())
        notes = (*notes, counted.note())
    title = f"{describe(small)}, bf16: distance from float64 in units of one process' distance, {number + 1} seeds"
    return Proof(title, notes, tuple(rows))


def _add(sums: dict[tuple[str, str], float], more: Mapping[tuple[str, str], float]) -> None:
    for key, value in more.items():
        sums[key] += value


def _squares(trace: Trace, truth: Trace) -> dict[tuple[str, str], float]:
    """Squared distance from the truth of each tensor, over all steps, and of the loss."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    found["loss", "the run"] = sum((a - b) ** 2 for a, b in zip(trace.losses, truth.losses, strict=True))
    for a, b in zip(trace.gradients, truth.gradients, strict=True):
        for name in a.keys() | b.keys():
            found["gradients", name] += _distance(a, b, name)
    for name in trace.state.keys() | truth.state.keys():
        ours, theirs = (_in_units_of_gradients(one.state.get(name, {})) for one in (trace, truth))
        for kind in ours.keys() | theirs.keys():
            found[kind.replace("weight", "weights"), name] += _distance(ours, theirs, kind)
    return found


def _in_units_of_gradients(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state with the root of its second moment: of squares the largest alone would decide."""
    return {kind: tensor.sqrt() if kind == "exp_avg_sq" else tensor for kind, tensor in state.items()}


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> float:
    if name not in a or name not in b:
        return math.inf
    return float(torch.sum((a[name].double() - b[name].double()) ** 2))


def zero_gradients(truth: Trace) -> set[str]:
    """Parameters whose gradient is zero but for rounding in every step."""
    limits = [ZERO * math.sqrt(sum(float(g.square().sum()) for g in step.values())) for step in truth.gradients]
    names = set[str]().union(*truth.gradients)
    return {
        name
        for name in names
        if all(float(step[name].norm()) <= limit for step, limit in zip(truth.gradients, limits) if name in step)
    }


Squares = Mapping[tuple[str, str], float]


def _row(kind: str, layout: Squares, alone: Squares, zeros: Collection[str] = ()) -> Difference:
    """The largest ratio of distances among the tensors of one kind whose gradients are not zero."""
    worst, ratio = _largest(
        (key for key in {**alone, **layout} if key[0] == kind and key[1] not in zeros), layout, alone
    )
    return Difference(kind, ratio, RATIO, worst)


def _row_of_zeros(layout: Squares, alone: Squares, zeros: Collection[str]) -> Difference:
    """The largest among all kinds of tensors of parameters whose gradients are zero."""
    worst, ratio = _largest((key for key in {**alone, **layout} if key[1] in zeros), layout, alone)
    return Difference("of zero gradients", ratio, RATIO_OF_ZEROS, worst)


def _largest(keys: Iterable[tuple[str, str]], layout: Squares, alone: Squares) -> tuple[str, float]:
    """The name of the tensor with the largest ratio of distances, and the ratio."""
    ratios = {key: _ratio(layout.get(key, 0.0), alone.get(key, 0.0)) for key in keys}
    worst = max(ratios, key=lambda key: ratios[key])
    return worst[1], ratios[worst]


def _ratio(layout: float, alone: float) -> float:
    if math.isnan(layout) or math.isinf(layout):
        return math.inf
    return math.sqrt(layout / alone) if alone else (math.inf if layout else 0.0)
