"""Whatever learns, and since whenever: every strategy of fine-tuning computes in every layout, and in every ZeRO stage,
what it computes in one process; what is frozen stays what it is and costs nothing."""

import functools

import pytest
import torch
from models import config

from roots_dist.assembly.run import build_run
from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train.step import train_step
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge, trace
from roots_dist.testing.world import on_world
from roots_dist.verify.verify import FLOAT32_BOUNDS
from roots_dist.world.mesh import Mesh

STEPS = 4
STRATEGIES = {
    "full": dict(finetune__layer_lr_decay=0.8),
    "partial": dict(
        finetune__strategy="partial", finetune__trainable=["head.*", "blocks.2.*", "blocks.0.norm1.weight"]
    ),
    "progressive": dict(
        finetune__strategy="progressive",
        finetune__unfreeze_every=1,
        finetune__unfreeze_blocks=2,
        finetune__layer_lr_decay=0.9,
    ),
    "lora": dict(
        finetune__strategy="lora", finetune__lora_rank=3, finetune__lora_targets=["query", "value", "out", "up", "down"]
    ),
}
LAYOUTS = {
    "tp2": dict(tp=2),
    "tp2-sequence": dict(tp=2, sequence_parallel=True),
    "pp2": dict(pp=2),
    "pp2-zb-h1": dict(pp=2, schedule="zb-h1"),
    "tp2-pp2": dict(tp=2, pp=2, sequence_parallel=True),
}
FLOAT32 = dict(advanced__float64=False, advanced__engine="deepspeed", optim__lr=1e-3)


def of(strategy: str, model: str = "bert-classify", **changes: object) -> Config:
    return config(model, **STRATEGIES[strategy] | changes)


@functools.cache
def _alone(text: str) -> Trace:
    return merge(on_world(1, trace, Config.model_validate_json(text), 0, STEPS))


def alone(parallel: Config) -> Trace:
    return _alone(parallel.changed({**ONE_PROCESS, "train.micro_batch": 1}).model_dump_json())


def compare(parallel: Config, dp: int, bounds: dict[str, float]) -> None:
    size = parallel.parallel.tp * parallel.parallel.pp * dp
    found = merge(on_world(size, trace, parallel, 0, STEPS, timeout=200))
    rows = differences(alone(parallel), found, bounds)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_computes_what_one_process_computes(strategy, layout):
    compare(of(strategy, **{f"parallel__{k}": v for k, v in LAYOUTS[layout].items()}), 1, FLOAT64_BOUNDS)


@pytest.mark.parametrize("model", ["gpt-instruct", "t5-seq2seq"])
@pytest.mark.parametrize("strategy", ["progressive", "lora"])
def test_decoders_and_two_stacks_do_too(strategy, model):
    compare(of(strategy, model, parallel__tp=2, parallel__pp=2), 1, FLOAT64_BOUNDS)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_zero_stage_does_too(strategy, zero):
    compare(of(strategy, **FLOAT32, parallel__zero_stage=zero), 2, FLOAT32_BOUNDS)


@pytest.mark.parametrize("strategy, zero", [("lora", 3), ("progressive", 1), ("partial", 2)])
def test_all_of_it_together(strategy, zero):
    compare(of(strategy, **FLOAT32, parallel__zero_stage=zero, parallel__tp=2, parallel__pp=2), 2, FLOAT32_BOUNDS)


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
        graded = {q.name for q in run.params if q.tensor.grad is not None}
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
    for rank in on_world(dp, learned_numbers, made, timeout=200):
        wanted = [n for n in rank["all"] if n.startswith(("head.", "blocks.2.")) or n == "blocks.0.norm1.weight"]
        assert 0 < len(wanted) < len(rank["all"])
        assert rank["graded"] == rank["moments"] == wanted
        assert {*rank["changed"]} <= {*wanted} and len(rank["changed"]) > len(wanted) // 2


def test_moments_are_kept_when_more_of_the_model_joins():
    """The head's moments go on as if it had learned alone: Adam's count is that of each group."""
    whole = alone(of("progressive"))
    head_only = of("partial", finetune__trainable=["head.*"], finetune__layer_lr_decay=1.0)
    first = merge(on_world(1, trace, head_only.changed(ONE_PROCESS), 0, 1))
    first_step = merge(on_world(1, trace, of("progressive").changed(ONE_PROCESS), 0, 1))
    for name, state in first.state.items():
        if name.startswith("head."):
            torch.testing.assert_close(state["exp_avg"], first_step.state[name]["exp_avg"])
    assert (
        {n for n, s in first_step.state.items() if "exp_avg" in s}
        < {n for n, s in whole.state.items() if "exp_avg" in s}
        == {*whole.state}
    )
