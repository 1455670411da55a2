"""Mutants of the proof itself: a comparison that lets something pass."""

from __future__ import annotations

from .mutant import Mutant

PARITY, EXACT, LOW = "testing/parity.py", "verify/exact.py", "verify/low_precision.py"
PROOFS, TRACE = "verify/proofs.py", "verify/trainer_trace.py"
DIFFERENCES = "unit/test_differences.py"
VERIFIED = "runs/test_verify.py::test_a_run_with_a_ramp_is_proven_resumed_and_evaluated"


def _noticed(name: str, bug: str, before: str, after: str, test: str, file: str = PARITY) -> Mutant:
    return Mutant(name=name, bug=bug, file=file, before=before, after=after, test=f"{DIFFERENCES}::{test}")


PROOF = (
    _noticed(
        "copies_are_compared_with_themselves",
        "what other ranks hold is compared with itself",
        '_largest(state[name]["weight"][slices(rank, name)], copy)',
        "_largest(copy, copy)",
        "test_one_wrong_number_is_noticed_in_its_row_alone[a copy's last bit]",
    ),
    _noticed(
        "losses_of_other_ranks_are_not_compared",
        "what other ranks report as the loss is not looked at",
        "for r, rank in enumerate(ranks)\n        for i, (a, b)",
        "for r, rank in enumerate(ranks[:1])\n        for i, (a, b)",
        "test_one_wrong_number_is_noticed_in_its_row_alone[a loss that another rank reports]",
    ),
    _noticed(
        "a_row_of_nothing_passes",
        "a kind of number of which neither run has any passes",
        'return Difference(what, math.inf, bound, "nothing to compare")',
        'return Difference(what, 0.0, bound, "nothing to compare")',
        "test_nothing_is_not_equal_to_nothing",
    ),
    _noticed(
        "what_one_run_lacks_is_left_out",
        "only what both runs have is compared",
        "if name in a and name in b else math.inf for name in {**a, **b}}",
        "for name in a if name in b}",
        "test_what_only_one_of_two_runs_has_is_noticed",
    ),
    _noticed(
        "a_difference_that_is_no_number_passes",
        "NaN is smaller than every bound",
        "found = {name: math.inf if math.isnan(value) else value",
        "found = {name: 0.0 if math.isnan(value) else value",
        "test_unknown_held_out_losses_are_not_equal",
    ),
    _noticed(
        "a_part_that_no_rank_holds_is_left_as_it_is",
        "a weight of which a part is missing is compared as if it were there",
        "return whole if sum(part.numel() for _, part in slices) == whole.numel() else",
        "return whole if whole.numel() else",
        "test_what_only_one_of_two_runs_has_is_noticed",
    ),
    _noticed(
        "the_last_step_of_gradients_is_not_compared",
        "gradients of the last step are not compared",
        "for i, (step, norm) in enumerate(zip(trace.gradients, norms))",
        "for i, (step, norm) in enumerate(zip(trace.gradients[:-1], norms))",
        "test_one_wrong_number_is_noticed_in_its_row_alone[a gradient of the last step, on the second rank]",
    ),
    _noticed(
        "held_out_losses_are_not_compared",
        "the row of evaluation has the other metrics",
        'if ("/validation" in name) == is_score',
        'if "/validation" not in name',
        "test_one_wrong_number_is_noticed_in_its_row_alone[a held-out loss]",
    ),
    _noticed(
        "a_small_metric_may_be_wrong",
        "a learning rate that is wrong by a millionth is within the bound",
        "SMALL = 1e-2",
        "SMALL = 1e2",
        "test_one_wrong_number_is_noticed_in_its_row_alone[a learning rate]",
    ),
    _noticed(
        "a_resumed_run_is_compared_with_the_last_steps_less_one",
        "the first step after a resume is not compared",
        "losses=self.losses[step:]",
        "losses=self.losses[step + 1 :]",
        "test_a_resumed_run_is_compared_with_the_steps_that_it_made",
    ),
    _noticed(
        "bits_that_no_rank_reports_are_equal",
        "digests are looked for in what the ranks report alone",
        'found += [f"step {step}: {what} on no rank" for what in wanted if not any(what in own for own in reports)]',
        "pass",
        "test_bits_are_compared_both_ways",
        EXACT,
    ),
    _noticed(
        "bits_of_no_kind_are_equal",
        "a kind of digest of which there is none passes",
        'found += [] if wanted else [f"step {step}: nothing to compare"]',
        "pass",
        "test_nothing_is_not_equal_to_nothing",
        EXACT,
    ),
    _noticed(
        "what_an_exact_run_logs_is_not_compared",
        "held-out losses may have other bits",
        'exact_row(LOGGED, alone["steps"], others)',
        "exact_row(LOGGED, others[0]['steps'], others)",
        "test_what_an_exact_run_logs_is_compared_after_the_step_that_it_resumes_from",
        EXACT,
    ),
    _noticed(
        "the_mean_distance_decides_in_bf16",
        "in bf16 the tensor that is nearest to the truth decides",
        "worst = max(ratios, key=lambda key: ratios[key])",
        "worst = min(ratios, key=lambda key: ratios[key])",
        "test_in_bf16_one_tensor_that_is_too_far_is_noticed",
        LOW,
    ),
    _noticed(
        "a_small_gradient_counts_as_zero_in_bf16",
        "in bf16 every parameter has the bound of those whose gradient is zero",
        "ZERO = 1e-9",
        "ZERO = 1.0",
        "test_in_bf16_a_gradient_that_is_zero_but_for_rounding_has_a_bound_of_its_own",
        LOW,
    ),
    Mutant(
        name="a_resumed_run_is_compared_with_itself",
        bug="after a resume, a run is compared with what it computed itself, which an empty run passes",
        file=PROOFS,
        before="rest = truth.after(half)",
        after="rest = truth.after(config.train.steps)",
        test=VERIFIED,
    ),
    Mutant(
        name="what_a_run_logs_is_not_compared",
        bug="metrics and held-out losses of the run are not read",
        file=TRACE,
        before="for record in read_lines(folder / METRICS_FILE)",
        after="for record in ()",
        test=VERIFIED,
    ),
)
