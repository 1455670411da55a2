"""`python -m tests.mutants.systematic --sample 60`: mutate files at random places, and count what their tests notice.

The table (table.py) has bugs that somebody has thought of; here nobody has. What lives is a hole, or changes nothing
that could be seen. A mutant is dead if any of its file's tests fails, in whatever way, or hangs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from .mutant import ROOT, Mutant
from .named import ADAMW, DECODER, ENGINE, FAMILY, LAYOUT, MASKS, STRATEGY, T5_LAYOUT
from .operators import mutations
from .runner import Job, preload, run

MIXTRAL = LAYOUT("mixtral,tp=2,pp=2,interleaved,selective")
ZB_H1 = LAYOUT("gpt,pp=3,model__layers=7,train__global_batch=6,schedule=zb-h1")
SP = LAYOUT("llama,tp=4,sequence_parallel=True,model__attention_dropout=0.1")
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
TESTS: dict[str, tuple[str, ...]] = {
    "parallel/tensor/collectives.py": EVERYTHING,
    "parallel/tensor/linear.py": (
        "unit/test_linear.py", *EVERYTHING, STRATEGY("gpt-instruct+lora,tp=2,pp=2,schedule=zb-h1"),
        STRATEGY("bert-classify+lora,tp=2,sp,pp=2,1f1b"),
    ),
    "parallel/tensor/cross_entropy.py": ("independent/test_cross_entropy.py", "reference/test_lm_eval.py", *EVERYTHING),
    "parallel/tensor/embedding.py": EVERYTHING,
    "parallel/pipeline/executor.py": EVERYTHING,
    "parallel/pipeline/partition.py": ("unit/test_partition.py",),
    "parallel/optim/norm.py": (ENGINE("reference zero0 dp1"), ENGINE("reference zero1 dp2 tp=2"), ADAMW("gpt")),
    "parallel/optim/groups.py": (ENGINE("reference zero0 dp1"), "unit/test_groups.py", "independent/test_adamw.py"),
    "parallel/optim/trainable.py": ("independent/test_unfreezing.py", "parity/test_finetuning.py"),
    "parallel/zero/reference.py": ("conformance/test_zero.py", "independent/test_adamw.py"),
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
    "learning/objectives/mlm.py": ("unit/test_masking.py", "unit/test_mlm.py"),
    "learning/objectives/spans.py": ("unit/test_spans.py", "unit/test_prefix.py"),
    "learning/objectives/nsp.py": ("unit/test_masking.py",),
    "learning/data/batches.py": ("unit/test_data_batches.py",),
    "learning/data/order.py": ("unit/test_data_order.py", "unit/test_data_batches.py"),
    "config/lr_schedules.py": ("unit/test_rates.py",),
    "config/batch_ramp.py": ("unit/test_data_order.py", "unit/test_data_batches.py"),
    "schedule/schedules.py": ("unit/test_schedules.py",),
    "schedule/communication.py": ("unit/test_schedules.py",),
    "world/rng.py": ("independent/test_random_numbers.py", "independent/test_initial_weights.py"),
    "world/sharding.py": ("independent/test_adamw.py", *EVERYTHING),
}  # fmt: skip
"""File of the package -> tests that together should notice any mutant of it, cheap ones first."""


def mutants_of(file: str) -> list[Mutant]:
    """All of a file. The edit replaces the whole file."""
    source = (ROOT / "roots_dist" / file).read_text(encoding="utf-8")
    return [
        Mutant(
            name=f"{file}:{mutation.line}",
            bug=mutation.what,
            file=file,
            before=source,
            after=mutation.source,
            test=TESTS[file][0],
        )
        for mutation in mutations(source)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.systematic", description=__doc__)
    parser.add_argument("--files", nargs="+", metavar="FILE", choices=TESTS, default=list(TESTS), help="of the package")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn with the seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a mutant counts as hanging")
    asked = parser.parse_args(arguments)
    chosen = [mutant for file in asked.files for mutant in mutants_of(file)]
    if asked.sample:
        chosen = random.Random(asked.seed).sample(chosen, min(asked.sample, len(chosen)))
    preload()
    living: list[Mutant] = []
    jobs = [Job(mutant, TESTS[mutant.file], until_first_failure=True) for mutant in chosen]
    for number, result in enumerate(run(jobs, asked.workers, asked.limit), 1):
        mutant = result.job.mutant
        assert mutant is not None
        ends = [ending.outcome for ending in result.endings.values()]
        how = next((end for end in ends if end in ("failed", "error", "hung", "missing")), "lives")
        living += [mutant] if how == "lives" else []
        print(f"{number:3}/{len(jobs)} {result.seconds:5.1f} s {how:7} {mutant.name}  {mutant.bug[:100]}", flush=True)
    print(f"\n{len(jobs) - len(living)} of {len(jobs)} are dead: {100 * (1 - len(living) / len(jobs)):.0f} %")
    for mutant in living:
        print(f"✗ {mutant.name}  {mutant.bug}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
