"""What the proof rests on: a comparison notices one wrong number of each kind, and does not pass on nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge
from roots_dist.verify.exact import KINDS, exact_row, exact_rows
from roots_dist.verify.low_precision import _row, _row_of_zeros, _squares, zero_gradients
from roots_dist.verify.proofs import FLOAT32_BOUNDS

KINDS_OF_ROW = ["loss", "gradient norm", "gradients", "weights", "exp_avg", "exp_avg_sq", "evaluation", "other metrics"]
LOGGED = [[2, "loss/validation", 3.0], [2, "optim/lr", 1e-3], [4, "loss/validation", 2.5], [4, "optim/lr", 2e-3]]


def ranks() -> list[dict[str, Any]]:
    """What two tensor ranks report of four steps: a weight that is cut and one that both hold."""
    generator = torch.Generator().manual_seed(0)
    cut, whole = (torch.rand(shape, generator=generator, dtype=torch.float64) + 1 for shape in ((4, 3), (3,)))
    found = []
    for rank in range(2):
        mine = {"cut": cut[2 * rank : 2 * rank + 2]} | ({"whole": whole} if rank == 0 else {})
        found.append(
            {
                "losses": [4.0, 3.0, 2.0, 1.0],
                "norms": [2.0, 2.0, 2.0, 2.0],
                "shapes": {"cut": [4, 3], "whole": [3]} if rank == 0 else {"cut": [4, 3]},
                "slices": {"cut": [[2 * rank, 2 * rank + 2], [0, 3]], "whole": [[0, 3]]},
                "gradients": [{name: tensor / (step + 1) for name, tensor in mine.items()} for step in range(4)],
                "state": {
                    name: {"weight": tensor.clone(), "exp_avg": tensor / 8, "exp_avg_sq": tensor / 64}
                    for name, tensor in mine.items()
                },
                "copies": {} if rank == 0 else {"whole": whole.clone()},
                "logged": LOGGED if rank == 0 else [],
            }
        )
    return copy.deepcopy(found)


def failing(found: list[dict[str, Any]] | Trace, bounds=FLOAT64_BOUNDS) -> list[str]:
    trace = found if isinstance(found, Trace) else merge(found)
    return [row.what for row in differences(merge(ranks()), trace, bounds) if not row.passed]


def test_a_run_equals_itself_in_every_kind_of_number():
    rows = differences(merge(ranks()), merge(ranks()), FLOAT64_BOUNDS)
    assert [row.what for row in rows] == [*KINDS_OF_ROW, "copies on other ranks"]
    assert all(row.passed and row.largest == 0 for row in rows)


def nudge(path: tuple[Any, ...], by: float = 1e-6) -> Callable[[list[dict[str, Any]]], None]:
    def damage(found: list[dict[str, Any]]) -> None:
        *way, last = path
        place: Any = found
        for key in way:
            place = place[key]
        place[last] = place[last] + by

    return damage


def log(index: int, value: float) -> Callable[[list[dict[str, Any]]], None]:
    def damage(found: list[dict[str, Any]]) -> None:
        found[0]["logged"][index] = [*found[0]["logged"][index][:2], value]

    return damage


DAMAGES = {
    "a loss": (nudge((0, "losses", 3)), ["loss", "copies on other ranks"]),
    "a norm": (nudge((0, "norms", 0)), ["gradient norm", "copies on other ranks"]),
    "a gradient of the last step, on the second rank": (nudge((1, "gradients", 3, "cut")), ["gradients"]),
    "a weight": (nudge((1, "state", "cut", "weight")), ["weights"]),
    "a first moment": (nudge((0, "state", "whole", "exp_avg")), ["exp_avg"]),
    "a second moment": (nudge((0, "state", "cut", "exp_avg_sq")), ["exp_avg_sq"]),
    "a copy's last bit": (nudge((1, "copies", "whole"), 2e-16), ["copies on other ranks"]),
    "a loss that another rank reports": (nudge((1, "losses", 2), 5e-16), ["copies on other ranks"]),
    "a held-out loss": (log(2, 2.5 + 1e-6), ["evaluation"]),
    "a held-out loss that is no number": (log(0, math.nan), ["evaluation"]),
    "a learning rate": (log(3, 2e-3 * 1.000001), ["other metrics"]),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_one_wrong_number_is_noticed_in_its_row_alone(what):
    damage, expected = DAMAGES[what]
    found = ranks()
    damage(found)
    assert failing(found) == expected


def test_what_only_one_of_two_runs_has_is_noticed():
    for path, expected in (
        ((0, "gradients", 1, "whole"), ["gradients"]),
        ((0, "state", "whole", "exp_avg"), ["exp_avg"]),
        ((1, "state", "cut"), ["weights", "exp_avg", "exp_avg_sq"]),  # a part that no rank holds
    ):
        found = ranks()
        *way, last = path
        place: Any = found
        for key in way:
            place = place[key]
        del place[last]
        assert failing(found) == expected, path
    twice = ranks()
    twice[1]["state"]["whole"] = twice[0]["state"]["whole"]
    assert failing(twice) == ["weights", "exp_avg", "exp_avg_sq", "copies on other ranks"]


def test_nothing_is_not_equal_to_nothing():
    empty = Trace([], [], [], {}, {}, {})
    rows = differences(empty, empty, FLOAT64_BOUNDS)
    assert [row.what for row in rows] == [*KINDS_OF_ROW, "copies on other ranks"]
    assert {(row.passed, row.where) for row in rows} == {(False, "nothing to compare")}
    assert not exact_row("loss", [], []).passed
    assert not exact_row("(exp_avg)", [{"loss": "a"}], [{"steps": [{"loss": "a"}]}]).passed


def test_unknown_held_out_losses_are_not_equal():
    both = ranks()
    log(0, math.nan)(both)
    rows = {row.what: row for row in differences(merge(both), merge(both), FLOAT64_BOUNDS)}
    assert not rows["evaluation"].passed and rows["other metrics"].passed
    unknown = ranks()
    log(1, math.nan)(unknown)  # a speed that could not be measured, on both sides
    assert all(row.passed for row in differences(merge(unknown), merge(unknown), FLOAT64_BOUNDS))


def test_a_resumed_run_is_compared_with_the_steps_that_it_made():
    rest = merge(ranks()).after(2)
    assert (rest.losses, len(rest.norms), len(rest.gradients)) == ([2.0, 1.0], 2, 2)
    assert rest.logged == {(4, "loss/validation"): 2.5, (4, "optim/lr"): 2e-3}
    assert failing(rest) == ["loss", "gradient norm", "gradients", "evaluation", "other metrics"]


def test_gradients_of_data_ranks_are_added_up():
    second = ranks()
    for rank in second:
        rank["gradients"] = [{name: part / 2 for name, part in step.items()} for step in rank["gradients"]]
        rank["state"], rank["copies"] = {}, {}
    first = ranks()
    for rank in first:
        rank["gradients"] = [{name: part / 2 for name, part in step.items()} for step in rank["gradients"]]
    assert failing([*first, *second]) == []


def test_bits_are_compared_both_ways():
    truth = [{"loss": "a", **{f"w {kind}": "b" for kind in KINDS[2:]}}] * 2
    for kind in KINDS[2:]:
        assert exact_row(kind, truth, [{"steps": truth}]).passed
        less = [truth[0], {"loss": "a"}]
        row = exact_row(kind, truth, [{"steps": less}])
        assert (row.passed, row.where) == (False, f"step 1: w {kind} on no rank")
        assert not exact_row(kind, truth, [{"steps": truth[:1]}]).passed
        assert not exact_row(kind, less, [{"steps": truth}]).passed
    other = [truth[0], truth[1] | {"w (weight)": "c"}]
    row = exact_row("(weight)", truth, [{"steps": truth}, {"steps": other}])
    assert (row.largest, row.where) == (1, "step 1: w (weight) on rank 1")


def test_what_an_exact_run_logs_is_compared_after_the_step_that_it_resumes_from():
    bits = {"loss": "a", "gradient norm": "a", **{f"w {kind}": "b" for kind in KINDS[2:]}}
    truth = {"steps": [bits] * 4, "logged": [[2, "loss/validation", "x"], [4, "loss/validation", "y"]]}
    resumed = {"steps": [bits] * 2, "logged": [[4, "loss/validation", "y"]]}
    another = {"steps": [bits] * 2, "logged": []}
    assert all(row.passed for row in exact_rows(truth, [resumed, another], 2))
    *rest, logged = exact_rows(truth, [resumed | {"logged": [[4, "loss/validation", "x"]]}, another], 2)
    assert all(row.passed for row in rest) and "loss/validation of step 4" in logged.where
    assert not all(row.passed for row in exact_rows(truth, [resumed, another]))


def test_in_bf16_one_tensor_that_is_too_far_is_noticed():
    """Its distance from the truth, in units of one process' distance, whatever the other tensors do."""
    generator = torch.Generator().manual_seed(1)

    def noisy(scale: dict[str, float]) -> Trace:
        found = ranks()
        for rank in found:
            rank["losses"] = [loss + 1e-3 for loss in rank["losses"]]
            for step in rank["gradients"]:
                for name in step:
                    step[name] = step[name] + scale[name] * torch.randn(step[name].shape, generator=generator)
        return merge(found)

    truth = merge(ranks())
    alone, fair, wrong = (
        _squares(noisy(scale), truth)
        for scale in ({"cut": 1e-3, "whole": 1e-3}, {"cut": 1e-3, "whole": 1e-3}, {"cut": 1e-3, "whole": 4e-3})
    )
    assert _row("gradients", fair, alone).passed and _row("loss", fair, alone).passed
    assert (_row("gradients", wrong, alone).passed, _row("gradients", wrong, alone).where) == (False, "whole")
    missing = {key: value for key, value in alone.items() if key != ("gradients", "cut")}
    assert not _row("gradients", {**missing, ("gradients", "other"): 1.0}, alone).passed


def test_in_bf16_a_gradient_that_is_zero_but_for_rounding_has_a_bound_of_its_own():
    """A key's bias: its distance is that of roundings, of which a layout with messages has more."""
    truth = merge(ranks())
    for step in truth.gradients:
        step["bias"] = torch.full((3,), 1e-17)
    assert zero_gradients(truth) == {"bias"}
    alone = {("gradients", "cut"): 1.0, ("gradients", "bias"): 1e-8, ("weights", "bias"): 1e-8}
    for times, passes in ((2.0, True), (4.0, False)):
        layout = alone | {("weights", "bias"): 1e-8 * times**2}
        assert _row("gradients", layout, alone, {"bias"}).where == "cut"
        row = _row_of_zeros(layout, alone, {"bias"})
        assert (row.where, row.passed) == ("bias", passes) and row.largest == pytest.approx(times)


def test_float32_bounds_are_below_what_a_wrong_number_is_off_by():
    """A step of Adam moves a weight by its rate, at most; what differs by a hundredth of that is seen."""
    assert set(FLOAT32_BOUNDS) == set(FLOAT64_BOUNDS)
    found = ranks()
    nudge((0, "losses", 0), 1e-4)(found)
    nudge((0, "gradients", 0, "whole"), 1e-4)(found)
    assert failing(found, FLOAT32_BOUNDS) == ["loss", "gradients", "copies on other ranks"]
