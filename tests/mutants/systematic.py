"""`python -m tests.mutants.systematic --sample 200`: mutate files at random places, and count what their tests notice.

The table (table.py) has bugs that somebody has thought of; here nobody has. What lives is a hole, or changes nothing
that could be seen (equivalent.txt says why). A mutant is dead if any of its file's tests fails, in whatever way, or
hangs.

Mutants of functions run in forks of a process that has imported everything (warm.py). What lives there, and what
changes a module's import, is imported from a copy (runner.py).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from .mutant import ROOT, Mutant
from .named import (
    ADAMW,
    BITS,
    DECODER,
    ENGINE,
    EXPERT_LAYOUT,
    FAMILY,
    GRADIENTS,
    IN_CONTEXT,
    LAYOUT,
    MASKS,
    STRATEGY,
    T5_LAYOUT,
)
from .operators import mutations
from .runner import Job, Result, preload, run
from .warm import changed_code, run_warm

MIXTRAL = LAYOUT("mixtral,tp=2,pp=2,interleaved,selective")
ZB_H1 = LAYOUT("gpt,pp=3,model__layers=7,train__global_batch=6,schedule=zb-h1")
SP = LAYOUT("llama,tp=4,sequence_parallel=True,model__attention_dropout=0.1")
LATENTS = (LAYOUT("deepseek,tp=2,pp=2,1f1b"), LAYOUT("deepseek,tp=4,sp,cp=2"))
EVERYTHING = (
    LAYOUT("gpt,train__micro_batch=4"),
    LAYOUT("llama,tp=2,model__kv_heads=1"),
    SP,
    ZB_H1,
    LAYOUT("gpt,dp=2,tp=2,pp=2,sequence_parallel=True,zero_stage=1"),
    T5_LAYOUT("t5,pp=2,train__recompute=full,schedule=zb-h1,tp=2,sequence_parallel=True"),
    T5_LAYOUT("t5,objective__name=prefix,tp=2,sequence_parallel=True"),
    FAMILY("electra,dp=2,tp=2,pp=2,sequence_parallel=True,zero_stage=1"),
)
"""Layouts that go through most of a model."""
ADAPTERS = (
    STRATEGY("gpt-instruct+lora,tp=2,pp=2,schedule=zb-h1"),
    STRATEGY("bert-classify+lora,tp=2,sp,dp=2,zero=0"),
)
OF_LATENTS = STRATEGY(
    "deepseek+lora,tp=2,sequence_parallel=True,finetune__lora_targets="
    "['query', 'query_down', 'kv_down', 'kv_up', 'out']"
)
CUT_TEXTS = (
    IN_CONTEXT("gpt,cp=2,dp=2,zero_stage=1"),
    IN_CONTEXT("llama,cp=4,model__attention_dropout=0.1"),
    IN_CONTEXT("bloom,cp=4,cp_kind=heads,objective__reset_at_documents=True"),
    IN_CONTEXT("t5,cp=2,cp_kind=heads"),
)
CUT_EXPERTS = (
    EXPERT_LAYOUT("mixtral,dp=2,ep=2,zero_stage=0,model__experts=6"),
    EXPERT_LAYOUT("mixtral,dp=4,ep=2,zero_stage=1,model__experts=6"),
    EXPERT_LAYOUT("mixtral,dp=4,ep=2,zero_stage=3,model__experts=6"),
)
AS_PLAIN = "parity/test_exact.py::test_an_exact_run_computes_what_a_plain_one_does"
IN_BITS = tuple(map(BITS, ("gpt-degrees0-changes0", "llama-degrees1-changes1")))
CONTEXT_BITS = (f"{AS_PLAIN}[llama-degrees1]", BITS("gpt-degrees3-changes3"))
ZERO = tuple(
    map(
        ENGINE,
        (
            "reference zero0 dp1",
            "reference zero1 dp3",
            "reference zero2 dp2 pp=2 schedule=zb-h1",
            "reference zero3 dp3 clip_grad=0.0",
            "reference zero3 dp2 tp=2 sequence_parallel=True recompute=full",
            "reference zero3 dp2 pp=2",
        ),
    )
)
TASKS = ("unit/test_tasks.py",)
STEP = (
    "independent/test_loss_terms.py", "unit/test_scored.py", "unit/test_spikes.py", "bugs/test_finite.py",
    "unit/test_stopwatch.py", "independent/test_evaluation_sums.py", "independent/test_training_loop.py",
    ADAMW("gpt"), "independent/test_experts.py", *ZERO[:2], *EVERYTHING[:5], *IN_BITS,
)  # fmt: skip
TESTS: dict[str, tuple[str, ...]] = {
    "parallel/tensor/adapter.py": ("unit/test_linear.py", "independent/test_adapters.py", *ADAPTERS),
    "parallel/tensor/collectives.py": (
        *EVERYTHING, LAYOUT("olmo,tp=2,pp=2,gpipe"), *CUT_TEXTS, *CUT_EXPERTS, *IN_BITS, *CONTEXT_BITS,
        "parity/test_exact.py::test_ranks_sum_in_an_order_where_a_run_is_exact",
        "parity/test_exact.py::test_a_chunk_of_positions_belongs_to_its_shard",
    ),
    "parallel/tensor/context.py": ("parity/test_context.py", *CUT_TEXTS, "unit/test_stopwatch.py", *CONTEXT_BITS),
    "parallel/tensor/cross_entropy.py": (
        "independent/test_cross_entropy.py", "independent/test_low_precision.py", "reference/test_lm_eval.py",
        AS_PLAIN, "unit/test_dpo.py::test_loss_and_gradients_are_those_of_the_paper",
        *EVERYTHING, *IN_BITS,
    ),
    "parallel/tensor/dispatch.py": ("independent/test_experts.py", *CUT_EXPERTS, "parity/test_expert_parallel.py"),
    "parallel/tensor/embedding.py": (*EVERYTHING, *IN_BITS),
    "parallel/tensor/exact.py": ("parity/test_exact.py", *EVERYTHING[:3]),
    "parallel/tensor/by_positions.py": ("parity/test_exact.py", *EVERYTHING[:3]),
    "parallel/tensor/grouped.py": (
        "independent/test_experts.py", MIXTRAL, *CUT_EXPERTS, "independent/test_adapters.py",
        "parity/test_expert_parallel.py",
    ),
    "parallel/tensor/weight_gradient.py": ("unit/test_linear.py", *EVERYTHING, *IN_BITS),
    "parallel/tensor/linear.py": (
        "unit/test_linear.py", "independent/test_initial_weights.py", *EVERYTHING, *ADAPTERS, *IN_BITS,
        *CUT_EXPERTS[:1], "unit/test_budgets.py", GRADIENTS("phi"), GRADIENTS("gpt_neox"),
    ),
    "parallel/tensor/replicated.py": ("independent/test_initial_weights.py", *LATENTS, OF_LATENTS),
    "parallel/pipeline/executor.py": (*EVERYTHING, *ZERO[2:3], *ZERO[5:], *IN_BITS[1:], "unit/test_stopwatch.py"),
    "parallel/pipeline/partition.py": ("unit/test_partition.py",),
    "parallel/pipeline/parts.py": ("unit/test_parts.py", *EVERYTHING[4:6]),
    "parallel/pipeline/stage.py": ("reference/test_dropout_transformers.py", *EVERYTHING),
    "parallel/optim/norm.py": (
        "parity/test_exact.py::test_the_norm_is_the_same_sum_in_any_order", *ZERO[:2],
        ENGINE("reference zero1 dp2 tp=2"), ADAMW("gpt"), *IN_BITS,
    ),
    "parallel/optim/groups.py": (
        *ZERO[:1], "unit/test_groups.py", "independent/test_adamw.py", "parity/test_exact.py", "test_extensions.py",
    ),
    "parallel/optim/trainable.py": (
        "unit/test_verify_trainable.py", "independent/test_unfreezing.py", "parity/test_finetuning.py",
        "parity/test_expert_parallel.py::test_some_experts_of_a_layer_do_not_learn_alone_on_several_ranks",
    ),
    "parallel/zero/collectives.py": (*ZERO, "independent/test_size_switches.py"),
    "parallel/zero/flat.py": (*ZERO, *CUT_EXPERTS[1:], "conformance/test_zero.py"),
    "parallel/zero/piece_hooks.py": (
        "parity/test_zero_memory.py", *ZERO, *CUT_EXPERTS[1:], "conformance/test_zero.py",
    ),
    "parallel/zero/reference.py": (
        *ZERO, "independent/test_adamw.py", *CUT_EXPERTS[1:], *IN_BITS, "conformance/test_zero.py",
        "bugs/test_finite.py", "test_extensions.py",
    ),
    "parallel/zero/unit.py": (
        "parity/test_zero_memory.py", *ZERO, *CUT_EXPERTS[1:], *IN_BITS, "conformance/test_zero.py",
    ),
    "learning/models/attention.py": (
        "independent/test_attention.py", DECODER("llama"), DECODER("bloom"), *EVERYTHING, MASKS("clm"),
        "runs/test_runs.py",
    ),
    "learning/models/experts.py": ("independent/test_experts.py", MIXTRAL),
    "learning/models/router_terms.py": ("independent/test_experts.py", MIXTRAL),
    "learning/models/positions.py": ("independent/test_positions.py", "reference/test_t5_transformers.py", *EVERYTHING),
    "learning/models/norms.py": (DECODER("llama"), DECODER("gpt2"), *EVERYTHING, MASKS("clm")),
    "learning/models/heads.py": (
        "reference/test_heads_transformers.py", "independent/test_cross_entropy.py",
        FAMILY("bert,dp=2,tp=2,pp=2,sequence_parallel=True,zero_stage=1"),
        FAMILY("electra,dp=2,tp=2,pp=2,sequence_parallel=True,zero_stage=1"),
        STRATEGY("bert-classify+full,tp=2,sp,dp=2,zero=0"),
    ),
    "learning/models/vocab_head.py": (
        "independent/test_cross_entropy.py", "unit/test_dpo.py", "independent/test_initial_weights.py",
        "reference/test_lm_eval.py", "independent/test_size_switches.py", "unit/test_scored.py", GRADIENTS("gemma2"),
        *EVERYTHING, *CUT_TEXTS, *IN_BITS, *CONTEXT_BITS,
    ),
    "learning/objectives/classify.py": TASKS,
    "learning/objectives/clm.py": ("unit/test_data_batches.py", "independent/test_training_loop.py"),
    "learning/objectives/dpo.py": ("unit/test_dpo.py",),
    "learning/objectives/instruct.py": (*TASKS, "unit/test_conversations.py", "unit/test_packing.py"),
    "learning/objectives/mlm.py": ("unit/test_masking.py", "unit/test_mlm.py"),
    "learning/objectives/nsp.py": ("unit/test_pairs.py", "unit/test_masking.py"),
    "learning/objectives/prefix.py": ("unit/test_prefix.py",),
    "learning/objectives/rtd.py": ("unit/test_masking.py", "unit/test_mlm.py", "independent/test_loss_terms.py"),
    "learning/objectives/seq2seq.py": TASKS,
    "learning/objectives/spans.py": ("unit/test_spans.py", "unit/test_prefix.py"),
    "learning/objectives/tag.py": TASKS,
    "learning/data/batches.py": ("unit/test_data_batches.py",),
    "learning/data/packing.py": ("unit/test_packing.py",),
    "learning/data/order.py": ("unit/test_data_order.py", "unit/test_data_batches.py"),
    "config/lr_schedules.py": ("unit/test_rates.py",),
    "config/batch_ramp.py": ("unit/test_data_order.py", "unit/test_data_batches.py"),
    "runs/train/step.py": STEP,
    "runs/train/check_finite.py": STEP,
    "assembly/passes.py": STEP,
    "schedule/schedules.py": ("unit/test_schedules.py",),
    "schedule/communication.py": ("unit/test_schedules.py",),
    "world/batch.py": (
        "unit/test_data_batches.py", "unit/test_packing.py", "independent/test_attention.py", MASKS("clm"),
        "unit/test_tiles.py", "reference/test_generation_transformers.py", *EVERYTHING, *IN_BITS,
    ),
    "world/exact.py": (
        "parity/test_exact.py",
        "parity/test_plan.py::test_running_ranks_hold_and_send_what_was_predicted[exact, one process]",
    ),
    "world/mesh.py": ("unit/test_mesh.py", *EVERYTHING[4:], *CUT_TEXTS[:1], *CUT_EXPERTS, *IN_BITS),
    "world/positions.py": ("parity/test_context.py", *CUT_TEXTS),
    "world/rng.py": ("independent/test_random_numbers.py", "independent/test_initial_weights.py", "unit/test_fuse.py"),
    "world/sharding.py": ("unit/test_linear.py", "independent/test_adamw.py", *EVERYTHING, *CUT_EXPERTS, *ZERO),
    "world/tree_sum.py": ("parity/test_exact.py",),
}  # fmt: skip
"""File of the package -> tests that together should notice any mutant of it, cheap ones first."""


EXPLAINED = ROOT / "tests" / "mutants" / "equivalent.txt"


def explained() -> dict[tuple[str, str], str]:
    """File and place of each mutant that changes nothing -> why."""
    found, why = {}, ""
    for line in EXPLAINED.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            file, _, place = line.strip().partition("  ")
            found[file, place] = why
        else:
            why = line
    return found


def mutants_of(file: str) -> list[Mutant]:
    """All of a file. The edit replaces the whole file."""
    source = (ROOT / "roots_dist" / file).read_text(encoding="utf-8")
    return [
        Mutant(
            name=f"{file}:{mutation.line}",
            bug=mutation.place,
            file=file,
            before=source,
            after=mutation.source,
            test=TESTS[file][0],
        )
        for mutation in mutations(source)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    every = [mutant for file in TESTS if file.startswith(tuple(asked.files)) for mutant in mutants_of(file)]
    random.Random(asked.seed).shuffle(every)
    drawn = every[asked.skip : None if asked.sample is None else asked.skip + asked.sample]
    if asked.lines:
        drawn = [mutant for mutant in every if mutant.name in asked.lines]
    why = explained()
    equal = [mutant for mutant in drawn if (mutant.file, mutant.bug) in why]
    jobs = [Job(mutant, TESTS[mutant.file], until_first_failure=True) for mutant in drawn if mutant not in equal]
    print(f"{len(drawn)} of {len(every)} mutants, of which {len(equal)} change nothing", flush=True)
    preload()
    if asked.unmutated:
        tests = tuple(dict.fromkeys(test for job in jobs for test in job.tests))
        (result,) = run_warm([Job(None, tests)], 1, asked.limit)
        wrong = {test: end for test, end in result.endings.items() if end.outcome not in ("passed", "skipped")}
        print(
            f"{len(result.endings)} tests without a mutant in {result.seconds:.0f} s: {wrong or 'all pass'}", flush=True
        )
        return 1 if wrong else 0
    at_import = [job for job in jobs if changed_code(_of(job)) is None]
    living, left = list(at_import), list[Mutant]()
    warm = [job for job in jobs if job not in at_import]
    for number, result in enumerate(run_warm(warm, asked.workers, asked.limit), 1):
        living += [] if _say(number, len(warm), result, ("failed", "error", "hung")) else [result.job]
    if asked.quick:
        left, living = [_of(job) for job in living if job not in at_import], at_import
    print(f"{len(living)} from a copy", flush=True)
    for number, result in enumerate(run(living, asked.workers, asked.limit), 1):
        left += [] if _say(number, len(living), result, ("failed", "error", "hung", "missing")) else [_of(result.job)]
    print(f"\n{len(jobs) - len(left)} of {len(jobs)} are dead: {100 * (1 - len(left) / max(1, len(jobs))):.1f} %")
    for mutant in left:
        print(f"✗ {mutant.name}  {mutant.bug}")
    return 1 if left else 0


def _of(job: Job) -> Mutant:
    assert job.mutant is not None
    return job.mutant


def _say(number: int, count: int, result: Result, deaths: Sequence[str]) -> bool:
    """Whether the mutant is dead; a line for it. deaths: how one dies."""
    mutant = _of(result.job)
    ends = {ending.outcome: test for test, ending in result.endings.items()}
    how = next((end for end in deaths if end in ends), "lives")
    head = f"{number:3}/{count} {result.seconds:5.1f} s {how:7}"
    print(f"{head} {mutant.name}  {mutant.bug[:110]}  {ends.get(how, '')[:90]}", flush=True)
    return how != "lives"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.systematic", description=__doc__)
    parser.add_argument("--files", nargs="+", metavar="FILE", default=[""], help="files or folders; all by default")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn with the seed; all by default")
    parser.add_argument("--skip", type=int, metavar="N", default=0, help="leave out the first N that are drawn")
    parser.add_argument("--lines", nargs="+", metavar="FILE:LINE", help="these alone, instead of a sample")
    parser.add_argument("--unmutated", action="store_true", help="run the tests of the sample without any mutant")
    parser.add_argument("--quick", action="store_true", help="let what lives in a fork count as living")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds without a test that ends: it hangs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
