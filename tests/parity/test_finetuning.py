"""Every strategy of fine-tuning computes in every layout, and in every ZeRO stage, what it computes in one process;
what is frozen stays what it is and costs nothing."""

import cases
import pytest
import torch
from cases import FLOAT32, MODELS_WITH_STRATEGIES, Case, alone, case, compare, covered, product_of
from models import STRATEGIES, config

from roots_dist.assembly.run import build_run
from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train.step import train_step
from roots_dist.testing.parity import FLOAT64_BOUNDS, merge, trace
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.verify.proofs import FLOAT32_BOUNDS
from roots_dist.world.mesh import Mesh

STEPS = 4
"""Until everything has joined, where blocks join one after another."""
EXPERTS = dict(
    model__experts=4,
    model__shared_expert_ffn=12,
    model__shared_expert_gate=True,
    objective__balance_loss=0.1,
    objective__router_z_loss=0.1,
)
LATENT_LAYERS = ("query_down", "kv_down", "kv_up", "out")
CASES = [
    *covered(MODELS_WITH_STRATEGIES),
    *(
        case(f"{model}+{strategy}", tp=2, pp=2, **schedule)
        for strategy, schedule in (("progressive", {}), ("lora", dict(schedule="zb-h1")))
        for model in ("gpt-instruct", "t5-seq2seq")
    ),
    case("llama-packed+lora", tp=2, pp=2, sequence_parallel=True, schedule="zb-h1", train__recompute="full", **EXPERTS),
    case("deepseek+lora", tp=2, sequence_parallel=True, finetune__lora_targets=["query", *LATENT_LAYERS]),
    case("llama-packed+lora", cp=2, finetune__lora_targets=["query", "up"]),
]
TOGETHER = {("lora", 3), ("progressive", 1), ("partial", 2)}
"""Strategies and ZeRO stages that are tried under tensor and pipeline parallelism too."""


def steps_of(case: Case) -> int:
    return STEPS if case.model.endswith("+progressive") else cases.STEPS


def of(strategy: str, **changes: object) -> Config:
    return config(f"bert-classify+{strategy}", **changes)


@pytest.mark.parametrize("case", CASES)
def test_a_strategy_computes_what_one_process_computes(case):
    compare(case, FLOAT64_BOUNDS, steps_of(case))


def product() -> list:
    return product_of(MODELS_WITH_STRATEGIES)


@pytest.mark.full
def test_nothing_depends_on_any_layout(case_of_the_product):
    compare(case_of_the_product, FLOAT64_BOUNDS, steps_of(case_of_the_product))


@pytest.mark.parametrize(
    "case",
    [
        case(
            f"bert-classify+{s}",
            dp=2,
            zero_stage=zero,
            **FLOAT32,
            **(dict(tp=2, pp=2) if (s, zero) in TOGETHER else {}),
        )
        for s in STRATEGIES
        for zero in (1, 2, 3)
    ],
)
def test_every_zero_stage_does_too(case):
    compare(case, FLOAT32_BOUNDS, steps_of(case))


@pytest.mark.parametrize(
    "case",
    [
        case(f"bert-classify+{s}", full=(s, zero) != ("lora", 3), dp=2, zero_stage=zero)
        for s in STRATEGIES
        for zero in (1, 2, 3)
    ],
)
def test_every_stage_of_the_built_in_zero_does_in_float64(case):
    compare(case, FLOAT64_BOUNDS, steps_of(case))


def learned_numbers(rank: int, size: int, config: Config) -> dict:
    """How many numbers have a gradient in backward, have moments, and have changed; and how many there are."""
    p = config.parallel
    run = build_run(
        config,
        Mesh.connect(Layout(dp=size // (p.tp * p.pp), pp=p.pp, tp=p.tp), rank),
        objective=proof_objective(config),
    )
    before = {q.name: run.engine.read_state(q.name)["weight"] for q in run.params}
    run.engine.unfreeze(0)
    batches = random_batches(config, 0, run.mesh.dp.rank, run.mesh.dp.size)
    with run.engine.accumulate():
        run.passes.forward_backward(batches, dict.fromkeys(run.objective.weights, 1.0))
    graded = {q.name for q, norm in run.engine.local_norms() if norm > 0}
    run.engine.zero_grad()
    train_step(run, batches, 1e-2)
    after = {q.name: run.engine.read_state(q.name) for q in run.params}
    return {
        "graded": sorted(graded),
        "moments": sorted(name for name, state in after.items() if "exp_avg" in state),
        "changed": sorted(name for name, state in after.items() if not torch.equal(state["weight"], before[name])),
        "all": sorted(after),
    }


@pytest.mark.parametrize("zero, dp", [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_what_is_frozen_has_no_gradient_no_moments_and_no_change(zero, dp):
    made = of("partial", **(FLOAT32 if dp > 1 else {}), parallel__zero_stage=zero)
    world = on_warm_world if dp == 1 else on_world
    for rank in world(dp, learned_numbers, made, timeout=200):
        wanted = [n for n in rank["all"] if n.startswith(("head.", "blocks.2.")) or n == "blocks.0.norm1.weight"]
        assert 0 < len(wanted) < len(rank["all"])
        assert rank["graded"] == rank["moments"] == wanted
        assert {*rank["changed"]} <= {*wanted} and len(rank["changed"]) > len(wanted) // 2


def test_moments_are_kept_when_more_of_the_model_joins():
    """The head's moments go on as if it had learned alone: Adam's count is that of each group."""
    whole = alone(of("progressive"), STEPS)
    head_only = of("partial", finetune__trainable=["head.*"], finetune__layer_lr_decay=1.0)
    first = merge(on_warm_world(1, trace, head_only.changed(ONE_PROCESS), 0, 1))
    begun = merge(on_warm_world(1, trace, of("progressive").changed(ONE_PROCESS), 0, 1))
    for name, state in first.state.items():
        if name.startswith("head."):
            torch.testing.assert_close(state["exp_avg"], begun.state[name]["exp_avg"])
    assert (
        {n for n, s in begun.state.items() if "exp_avg" in s}
        < {n for n, s in whole.state.items() if "exp_avg" in s}
        == {*whole.state}
    )
