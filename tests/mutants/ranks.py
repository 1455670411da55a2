"""Mutants of what ranks find out of each other: who differs, who hangs, whose copies drift."""

from __future__ import annotations

from .mutant import Mutant
from .named import ENGINE

HANDSHAKE = "runs/ranks/handshake.py"
NAMED = "launch/test_handshake.py::test_the_key_the_rank_and_its_host_are_named_on_all_ranks"

COPIES, NAMED_COPIES = (
    "runs/train/copies.py",
    "unit/test_copies.py::test_the_parameter_and_the_rank_are_named_or_healed",
)
HANGS = "launch/test_hangs.py::"
REWOUND = "unit/test_rewind.py"

RANKS = (
    Mutant(
        name="the_handshake_compares_rank_0_with_itself",
        bug="rank 0 takes its own digests for those of every rank",
        file=HANDSHAKE,
        before='rows = {rank: json.loads(row)["digests"] for rank, row in enumerate(store.multi_get(keys))}',
        after="rows = {rank: digests(mine) for rank in range(size)}",
        test=NAMED,
    ),
    Mutant(
        name="the_fewest_ranks_are_taken_for_the_right_ones",
        bug="of ranks that differ those are named that are alike",
        file=HANDSHAKE,
        before="key=lambda ranks: (-len(ranks), ranks[0])",
        after="key=lambda ranks: (len(ranks), ranks[0])",
        test=NAMED,
    ),
    Mutant(
        name="a_large_file_is_compared_by_its_size",
        bug="of a corpus that is not read whole no byte is compared",
        file="runs/ranks/fingerprint.py",
        before="                read += file.read(BLOCK_BYTES)\n",
        after="",
        test="launch/test_handshake.py::test_files_are_compared_by_content_and_large_ones_by_blocks",
    ),
    Mutant(
        name="a_rank_that_waits_is_a_cause",
        bug="of ranks that hang, one that waits for another is named too",
        file="runs/ranks/hang.py",
        before="rank for rank in awaited if not states[rank].operation",
        after="rank for rank in awaited",
        test=HANGS + "test_ranks_in_different_operations_wait_for_each_other",
    ),
    Mutant(
        name="a_rank_has_begun_what_it_has_not",
        bug="a rank that is one operation behind is taken to have called it",
        file="runs/ranks/hang.py",
        before="return other.begun[state.group] >= state.number",
        after="return other.begun[state.group] >= state.number - 1",
        test=HANGS + "test_a_rank_that_answers_and_waits_for_nobody_is_the_cause",
    ),
    Mutant(
        name="copies_over_tensor_ranks_are_compared_with_themselves",
        bug="a norm that differs between tensor ranks is not seen",
        file=COPIES,
        before="        differs[row] = largest != ~smallest",
        after="        differs[row] = largest != largest",
        test=NAMED_COPIES,
    ),
    Mutant(
        name="only_the_first_of_two_slices_is_compared",
        bug="of key heads that are on several tensor ranks the first slice alone is compared",
        file=COPIES,
        before="        largest, smallest = place[p.spec.shard_index(tp)]",
        after="        largest, smallest = place[0]",
        test=NAMED_COPIES,
    ),
    Mutant(
        name="tied_copies_are_not_compared",
        bug="the copies of a tied embedding on two stages may drift apart",
        file=COPIES,
        before="        differs[rows] |= _differs(axis, digests[rows])",
        after="        pass",
        test=NAMED_COPIES,
    ),
    Mutant(
        name="healing_spreads_the_wrong_copy",
        bug="copies are overwritten with that of a rank that is not like most",
        file=COPIES,
        before="is_right = mesh.rank in found.right",
        after="is_right = mesh.rank in found.wrong",
        test=NAMED_COPIES,
    ),
    Mutant(
        name="a_save_does_not_compare_copies",
        bug="a checkpoint is written of weights that differ between ranks",
        file="runs/train/saving.py",
        before="    check_copies(state.run, state.step)  # what has drifted apart is never saved\n",
        after="",
        test="unit/test_copies.py::test_what_differs_is_never_saved",
    ),
    Mutant(
        name="spikes_are_in_the_window",
        bug="a loss that was skipped as a spike raises the limit of the next",
        file="runs/train/spikes.py",
        before="        if not was_spike:\n            self.loss.note(loss)",
        after="        if True:\n            self.loss.note(loss)",
        test="unit/test_spikes.py::test_a_spike_is_above_the_median_by_the_spread_and_never_in_the_window",
    ),
    Mutant(
        name="a_rewind_leaves_out_one_step_more",
        bug="a run that went back leaves out samples that it has not read",
        file="runs/train/spikes.py",
        before="sum(samples for first, samples in self.left_out if first <= step)",
        after="sum(samples + 2 for first, samples in self.left_out if first <= step)",
        test=f"{REWOUND}::test_a_spike_takes_a_run_back_and_its_samples_are_never_read_again",
    ),
    Mutant(
        name="a_resume_forgets_what_was_left_out",
        bug="a run that is killed after it went back reads other samples than it would have",
        file="runs/train/left_out.py",
        before="ours if ours[: len(found)] == found else found",
        after="found",
        test=f"{REWOUND}::test_a_run_that_is_killed_after_it_went_back_reads_what_it_would_have_read[at once]",
    ),
    Mutant(
        name="a_norm_above_the_limit_is_a_step",
        bug="DeepSpeed takes a step whose gradient norm is a spike",
        file="parallel/zero/engine.py",
        before="len(found) == count and _total(found, dp) > limit",
        after="len(found) > count and _total(found, dp) > limit",
        test=ENGINE("deepspeed zero1 dp3"),
    ),
    Mutant(
        name="a_failure_counts_for_each_rank",
        bug="a failure that three ranks report is taken for three of them",
        file="runs/train/repeats.py",
        before="if all(failure.attempt != attempt for failure in found):",
        after="if True:",
        test="runs/test_repeats.py::test_only_the_same_failure_of_the_same_step_counts_and_once_for_each_start",
    ),
    Mutant(
        name="a_skipped_step_ends_a_row_of_spikes",
        bug="a step that was skipped for its gradient is taken for one whose loss is fine",
        file="runs/train/spikes.py",
        before="if was_skipped and not was_spike:",
        after="if False:",
        test="unit/test_spikes.py::test_a_step_that_was_skipped_for_its_gradient_says_nothing_of_spikes",
    ),
    Mutant(
        name="a_rank_that_waits_is_slow",
        bug="ranks are compared by the time for which they wait",
        file="runs/train/slow_ranks.py",
        before='OWN_PARTS = ("data", "compute")',
        after='OWN_PARTS = ("data", "compute", "tp", "pp_wait", "dp")',
        test="unit/test_spikes.py::test_a_rank_is_slow_by_what_it_computes_in_three_reports",
    ),
)
