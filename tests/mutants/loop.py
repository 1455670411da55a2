"""Mutants of runs: rates, resuming, evaluation, checkpoints, the best of them."""

from __future__ import annotations

from .mutant import Mutant
from .named import SUMS

LOOP, RATES, LOAD = "runs/train/loop.py", "config/lr_schedules.py", "storage/checkpoint/load.py"
HELD_OUT = "runs/evaluate/held_out.py"
RESUMED = "runs/test_runs.py::test_a_run_goes_on_as_if_nothing_had_happened"
BEST = "unit/test_best_evaluation.py::test_the_best_is_the_lowest_loss_or_the_highest_score[loss]"
CHECKPOINT = "unit/test_checkpoint.py"

RUNS = (
    Mutant(
        name="warm_up_begins_at_zero",
        bug="the first step has rate 0, and the last of the warm-up less than the full rate",
        file=RATES,
        before="return optim.lr * (step + 1) / optim.warmup_steps",
        after="return optim.lr * step / optim.warmup_steps",
        test="unit/test_rates.py::test_rates_are_those_of_transformers[cosine]",
    ),
    Mutant(
        name="decay_counts_the_warm_up",
        bug="a decay begins with the run, not after its warm-up",
        file=RATES,
        before="return optim.warmup_steps, optim.decay_steps or max(1, steps - optim.warmup_steps)",
        after="return 0, optim.decay_steps or max(1, steps)",
        test="unit/test_rates.py::test_rates_are_those_of_transformers[cosine]",
    ),
    Mutant(
        name="a_resumed_run_reads_from_the_first_sample",
        bug="a resumed run reads again what it has read",
        file=LOOP,
        before="report = take_step(state, made.at, learning_rate(step))",
        after="report = take_step(state, lambda step: made.at(step - first), learning_rate(step))",
        test=RESUMED,
    ),
    Mutant(
        name="a_resumed_run_warms_up_again",
        bug="a resumed run takes its rates from the beginning",
        file=LOOP,
        before="report = take_step(state, made.at, learning_rate(step))",
        after="report = take_step(state, made.at, learning_rate(step - first))",
        test=RESUMED,
    ),
    Mutant(
        name="resumed_first_moments_are_the_second_ones",
        bug="a checkpoint's second moments are read as the first",
        file=LOAD,
        before="{kind: reader.slice(kind, p) for",
        after='{kind: reader.slice("exp_avg_sq" if kind == "exp_avg" else kind, p) for',
        test=RESUMED,
    ),
    Mutant(
        name="tied_copies_are_not_resumed",
        bug="a resumed run leaves the copies of tied weights as they were drawn",
        file=LOAD,
        before="    for p in params:\n        engine.write_state(p.name, {kind: reader",
        after="    for p in (p for p in params if not p.is_copy):\n        engine.write_state(p.name, {kind: reader",
        test=CHECKPOINT + r"::test_every_layout_reads_what_one_process_saved[TP1\xd7PP4\xd7DP1]",
    ),
    Mutant(
        name="tied_copies_do_not_start_from_the_weights",
        bug="a run that starts from another's weights leaves the copies of tied ones as they were drawn",
        file=LOAD,
        before="        if p.name not in untrained:\n",
        after="        if p.name not in untrained and not p.is_copy:\n",
        test=f"{CHECKPOINT}::test_every_layout_starts_from_what_one_process_saved",
    ),
    Mutant(
        name="started_weights_are_not_published",
        bug="a run that starts from another's weights computes its first step with those that it drew",
        file=LOAD,
        before="    engine.finish_loading(engine.optimizer_steps)\n\n\nclass",
        after="\n\nclass",
        test="bugs/test_bf16.py::test_a_bf16_model_begins_with_the_weights_that_it_starts_from",
    ),
    Mutant(
        name="dropout_stays_on_in_evaluation",
        bug="held-out text is scored with dropout",
        file="assembly/passes.py",
        before="            module.eval()\n",
        after="            pass\n",
        test=SUMS("1-1"),
    ),
    Mutant(
        name="dropout_stays_off_after_an_evaluation",
        bug="a run does not return to training mode after its first evaluation",
        file="assembly/passes.py",
        before="            module.train()\n",
        after="            pass\n",
        test=RESUMED,
    ),
    Mutant(
        name="tensor_ranks_add_their_evaluations_up",
        bug="sums and counts of an evaluation are added over tensor ranks, which hold them alike",
        file=HELD_OUT,
        before="        sums.zero_()\n        confusion.zero_()",
        after="        pass",
        test="runs/test_evaluate.py::test_the_loss_is_the_one_that_training_logged_in_any_layout[2-overrides1]",
    ),
    Mutant(
        name="bits_are_nats",
        bug="bits per byte are nats per byte",
        file=HELD_OUT,
        before=".mean / math.log(2) / self.bytes_per_token",
        after=".mean / self.bytes_per_token",
        test=SUMS("1-1"),
    ),
    Mutant(
        name="sources_weigh_alike",
        bug="of several sources the first one's score is reported for all together",
        file=HELD_OUT,
        before="TermSums(*map(sum, zip(*(score.terms[name] for score in every))))",
        after="one.terms[name]",
        test="runs/test_evaluate.py::test_each_source_has_a_row_and_all_together_count_every_target_once",
    ),
    Mutant(
        name="the_highest_loss_is_the_best",
        bug="of several evaluations the one with the highest loss is kept",
        file="runs/train/best_evaluation.py",
        before='lower_is_better = self.metric.startswith("loss/")',
        after="lower_is_better = False",
        test=BEST,
    ),
    Mutant(
        name="patience_is_one_longer",
        bug="a run that does not get better stops an evaluation late",
        file="runs/train/best_evaluation.py",
        before="return 0 < self.patience <= self.waited",
        after="return 0 < self.patience < self.waited",
        test=BEST,
    ),
)
