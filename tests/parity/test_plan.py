"""A plan is what happens: a stage costs on shapes alone what it costs with numbers, and running ranks hold
and send what was predicted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import config as model_config

from roots_dist.accounting.sizes import parameters
from roots_dist.assembly.rank_model import build_model
from roots_dist.assembly.run import build_run
from roots_dist.checks.checks import layout_for
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.layout import Layout
from roots_dist.learning.models.block import Block
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.plan.cluster_speed import ring_bytes
from roots_dist.runs.plan.cost_counter import CostCounter
from roots_dist.runs.plan.equal_pieces import EqualPieces
from roots_dist.runs.plan.passes import Fold, fold
from roots_dist.runs.plan.predict import predict
from roots_dist.runs.plan.rank_cost import count_rank_cost, count_stage_costs, fake_mesh, one_microbatch
from roots_dist.runs.train.step import train_step
from roots_dist.schedule.actions import Kind
from roots_dist.testing.world import on_world
from roots_dist.world import rng
from roots_dist.world.mesh import Mesh


def config(model: str = "gpt", **changes: object) -> Config:
    return model_config(
        model, **{(key if "__" in key else f"parallel__{key}"): value for key, value in changes.items()}
    )


# ── shapes alone ────────────────────────────────────────────────────────────────────────────────────────────────────


FAMILIES = ("gpt", "llama", "bloom", "bert", "roberta", "electra", "t5", "t5-v1.1", "bert-classify", "t5-seq2seq")
OTHERWISE = ({"train__recompute": "full"}, {"train__recompute": "selective"}, {"schedule": "zb-h1"})


STAGES = [
    pytest.param(model, changes, pp_rank, marks=[] if number % 2 == pp_rank else pytest.mark.full)
    for number, (model, changes) in enumerate([*((name, {}) for name in FAMILIES), *(("gpt", c) for c in OTHERWISE)])
    for pp_rank in (0, 1)
]
"""Both stages of each; in the suite the first of one model and the last of the next."""


@pytest.mark.parametrize("model, changes, pp_rank", STAGES)
def test_a_stage_costs_without_numbers_what_it_costs_with_them(model, changes, pp_rank):
    """To the byte and the operation."""
    made = config(model, pp=2, **changes)
    layout = Layout(pp=2)
    on_shapes = count_rank_cost(made, layout, pp_rank).stages
    with mock.patch.object(rng, "kernels_of", return_value=rng.CountedKernels()):  # a CPU has none
        real = count_stage_costs(
            made,
            build_model(made, fake_mesh(layout, pp_rank, None, torch.device("cpu"))),
            one_microbatch(made),
            CostCounter(),
            [],
        )
    assert on_shapes == real


LONG = {
    "gpt, recomputed": {"model__layers": 7, "train__recompute": "full"},
    "gpt, the upper blocks learn": {
        "model__layers": 14,
        "finetune__strategy": "partial",
        "finetune__trainable": ["head.*", *(f"blocks.{i}.*" for i in range(7, 14))],
    },
    "gemma": {"model__layers": 13, "tp": 2},
    "olmo": {"model__layers": 16, "cp": 2},
    "electra": {"model__layers": 6, "generator__layers": 7},
    "t5": {"model__layers": 7, "model__decoder_layers": 6},
    "qwen-moe": {"model__layers": 8, "ep": 7, "zero_stage": 3},
    "llama, adapters": {"model__layers": 12, "finetune__strategy": "lora", "pp": 2, "schedule": "zb-h1"},
}


@pytest.mark.full
@pytest.mark.parametrize("name", LONG)
def test_equal_blocks_are_run_once_and_counted_as_often_as_they_are_there(name, monkeypatch):
    """All numbers are those of a rank whose every block has been run."""
    made = config(name.partition(",")[0], **LONG[name])
    p = made.parallel
    layout = Layout(pp=p.pp, tp=p.tp, cp=p.cp, dp=p.ep, ep=p.ep)
    passed: list[str] = []
    before = Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, *args: passed.append("") or before(block, *args))
    few, found, fewer = predict(made, layout), count_rank_cost(made, layout, p.pp - 1), len(passed)
    monkeypatch.setattr(EqualPieces, "folds", lambda *args: {})
    del passed[:]
    assert few == predict(made, layout)
    every = count_rank_cost(made, layout, p.pp - 1)
    assert found.stages == every.stages and found.once == every.once
    assert sorted(found.pieces) == sorted(every.pieces) and len(found.params) == len(every.params)
    assert fewer < len(passed)


def test_of_a_hundred_blocks_four_are_run(monkeypatch):
    passed: list[str] = []
    before = Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, *args: passed.append("") or before(block, *args))
    hundred, six = (count_rank_cost(config("mixtral", model__layers=n), Layout(), 0) for n in (100, 6))
    assert len(passed) == 2 * (4 + 4), "two microbatches of each"
    assert sum(p.tensor.numel() for p in hundred.params) == parameters(config("mixtral", model__layers=100))
    monkeypatch.setattr(EqualPieces, "folds", lambda *args: {})
    assert count_rank_cost(config("mixtral", model__layers=6), Layout(), 0).stages == six.stages


def test_blocks_that_begin_again_are_found_whatever_their_period():
    assert fold("abcdefg", [*"xxxxxxx"]) == Fold(frozenset("cde"), {"b": "b"}, {"b": 4}, {"b": "f"})
    assert fold("abcd", [*"xxxx"]) == fold("abcd", ["x", "y", None, None]) == fold("abcde", [None] * 5) == Fold()
    found = fold("abcdefghijklm", [*"ewfwfwfwfwfwh"])
    assert found == Fold(frozenset("fg"), {"d": "d", "e": "d"}, {"d": 2}, {"d": "h", "e": "i"})
    assert [found.count(piece) for piece in "bdeh"] == [1, 2, 2, 1]


def test_tensor_ranks_say_what_the_papers_count():
    """Per block and microbatch two sums forward and two backward (Shoeybi et al. 2019), of [B, S, D]; under sequence
    parallelism a gather and a scatter each, and in backward the inputs once more (Korthikanti et al. 2022, 4.2.2)."""
    whole = 4 * 16 * 32 * 8  # batch, seq, hidden, bytes

    @cache
    def passes(layers: int, sequence_parallel: bool):
        changes = {"model__attention_dropout": 0.0, "sequence_parallel": sequence_parallel}
        made = config("gpt", tp=4, model__layers=layers, **changes)
        return count_rank_cost(made, Layout(tp=4), 0).stages[0].passes

    def sent(layers: int, kind: Kind, sequence_parallel: bool = False) -> list[str]:
        return [m.operation for m in passes(layers, sequence_parallel)[kind].messages if m.bytes == whole]

    def of_a_block(kind: Kind, **changes: object) -> dict[str, int]:
        less, more = sent(1, kind, **changes), sent(2, kind, **changes)
        return {name: more.count(name) - less.count(name) for name in {*less, *more}}

    assert of_a_block(Kind.FORWARD) == of_a_block(Kind.BACKWARD) == {"all_reduce": 2}
    assert of_a_block(Kind.FORWARD, sequence_parallel=True) == {"all_gather": 2, "reduce_scatter": 2}
    assert of_a_block(Kind.BACKWARD, sequence_parallel=True) == {"all_gather": 4, "reduce_scatter": 2}


def test_full_recomputation_keeps_a_blocks_input_and_nothing_else():
    """Korthikanti et al. 2022, section 5: sbh numbers per layer."""

    def saved_bytes(layers: int) -> int:
        return (
            count_rank_cost(config("gpt", model__layers=layers, train__recompute="full"), Layout(), 0)
            .stages[0]
            .saved_bytes
        )

    assert saved_bytes(3) - saved_bytes(2) == 1 * 16 * 32 * 8


# ── running ranks ───────────────────────────────────────────────────────────────────────────────────────────────────


def held_and_sent(rank, size, made):
    """The most bytes of tensors alive at once in a step, after a first one; what went through tp and pp groups."""
    mesh = Mesh.connect(layout_for(made, size), rank)
    counter, sent = CostCounter(), {"tp": 0.0, "cp": 0.0, "pp": 0.0, "dp": 0.0}
    with counter:
        run = build_run(made, mesh, objective=proof_objective(made))
        for step in range(2):
            batches = random_batches(made, step, mesh.dp.rank, mesh.dp.size)
            batches = [replace(b, targets=present(b.targets).clamp(min=0)) for b in batches]  # all scored, as predicted
            if step == 1:
                _listen(sent, mesh)
            counter.restart_peak()
            train_step(run, batches, 1e-3)
    return {"peak": counter.peak, **sent}


def _listen(sent: dict[str, float], mesh: Mesh) -> None:
    """Counts what goes through the axes of this rank; groups of pp are several, those of ties with their data ranks."""

    def counted(name: str, operation: str, whole: int):
        before = getattr(dist, name)

        def call(*args, **kwargs):
            if not args:  # DeepSpeed's own, between data ranks
                return before(*args, **kwargs)
            group, tensor = kwargs.get("group"), args[whole]
            size = dist.get_world_size(group)
            if group is mesh.tp.group and mesh.tp.size > 1:
                sent["tp"] += ring_bytes(operation, tensor.nbytes, size)
            elif group is mesh.cp.group and mesh.cp.size > 1:
                if operation == "all_reduce":  # gradients, over dp × cp
                    return before(*args, **kwargs)
                sent["cp"] += ring_bytes(operation, tensor.nbytes, size)
            elif mesh.replica.size > 1 and group in (mesh.shard.group, mesh.replica.group):
                sent["dp"] += ring_bytes(operation, tensor.nbytes, size)
            elif group not in (None, mesh.dp.group, mesh.edp.group, mesh.world.group) and size > 1:
                sent["pp"] += ring_bytes(operation, tensor.nbytes, size)
            return before(*args, **kwargs)

        setattr(dist, name, call)

    counted("all_reduce", "all_reduce", 0)
    counted("all_gather_into_tensor", "all_gather", 0)
    counted("reduce_scatter_tensor", "reduce_scatter", 1)
    counted("all_to_all_single", "all_to_all", 1)
    counted("isend", "send", 0)


FLOAT = {
    "advanced__float64": False,
    "model__attention_dropout": 0.0,
    "model__vocab": 999,
    "data__seq_length": 32,
    "train__global_batch": 4,
    "train__device": "cpu",
}
MIXTURE = {"model__experts": 4, "model__ffn": 800, "train__global_batch": 8}
LAYOUTS = {
    "one process": (1, {}),
    "TP2 SP PP2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "CP2": (2, {"cp": 2, "zero_stage": 0}),
    "PP4": (4, {"pp": 4}),
    "PP2 interleaved": (2, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "PP2 zb-h1": (2, {"pp": 2, "schedule": "zb-h1"}),
    "PP2 recomputing": (2, {"pp": 2, "train__recompute": "full"}),
    "PP2 DP2": (4, {"pp": 2, "dp": 2, "train__global_batch": 8}),
    "DP2 ZeRO-1, bf16": (2, {"dp": 2, "zero_stage": 1, "advanced__engine": "deepspeed", "train__precision": "bf16"}),
    "PP2, the last block and the head learn": (
        2,
        {"pp": 2, "finetune__strategy": "partial", "finetune__trainable": ["head.*", "blocks.3.*"]},
    ),
    "TP2 PP2, adapters": (
        4,
        {
            "tp": 2,
            "pp": 2,
            "finetune__strategy": "lora",
            "finetune__lora_rank": 3,
            "finetune__lora_targets": ["query", "up"],
        },
    ),
    "TP2 DP2 ZeRO-3, DeepSpeed": (4, {"tp": 2, "dp": 2, "zero_stage": 3, "advanced__engine": "deepspeed"}),
    "TP2 DP2 ZeRO-3": (4, {"tp": 2, "dp": 2, "zero_stage": 3}),
    "DP4 ZeRO-3 over 2": (4, {"dp": 4, "zero_stage": 3, "zero_ranks": 2, "train__global_batch": 8}),
    "DP4 ZeRO-1 over 2": (4, {"dp": 4, "zero_stage": 1, "zero_ranks": 2, "train__global_batch": 8}),
    "DP2 EP2 ZeRO-3": (2, {"dp": 2, "ep": 2, "zero_stage": 3, **MIXTURE}),
    "DP2 EP2 ZeRO-2": (2, {"dp": 2, "ep": 2, "zero_stage": 2, **MIXTURE}),
    "DP4 EP2 ZeRO-3": (4, {"dp": 4, "ep": 2, "zero_stage": 3, **MIXTURE}),
    "exact, one process": (1, {"train__exact": {"tensor": 2, "data": 4}, "train__global_batch": 8}),
    "exact, TP2 SP": (
        2,
        {"tp": 2, "sequence_parallel": True, "train__exact": {"tensor": 4, "data": 2}, "train__micro_batch": 1},
    ),
    "exact, TP2 SP, experts": (
        2,
        {"tp": 2, "sequence_parallel": True, "train__exact": {"tensor": 4}, "train__micro_batch": 1, **MIXTURE},
    ),
    "exact, DP2 EP2": (
        2,
        {"dp": 2, "ep": 2, "zero_stage": 1, "train__exact": {"data": 4}, "train__micro_batch": 1, **MIXTURE},
    ),
    "exact, CP2": (
        2,
        {"cp": 2, "zero_stage": 0, "train__exact": {"context": 4}, "train__micro_batch": 1, "train__global_batch": 4},
    ),
    "DP4 ZeRO-3, many blocks": (4, {"dp": 4, "zero_stage": 3, "model__layers": 16, "train__recompute": "full"}),
    "PP2 DP2 ZeRO-2 zb-h1, many blocks": (
        4,
        {"pp": 2, "dp": 2, "zero_stage": 2, "model__layers": 16, "schedule": "zb-h1", "train__global_batch": 8},
    ),
    "PP2 DP2 ZeRO-2, bf16": (4, {"pp": 2, "dp": 2, "zero_stage": 2, "train__precision": "bf16"}),
}
LONGER = (
    "PP4",
    "PP2 recomputing",  # as ZeRO-3 of many blocks
    "PP2 DP2",
    "TP2 DP2 ZeRO-3",
    "DP4 ZeRO-1 over 2",
    "DP2 EP2 ZeRO-2",
    "DP4 EP2 ZeRO-3",
    "exact, TP2 SP, experts",
    "exact, DP2 EP2",
    "exact, CP2",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in LONGER else []) for name in LAYOUTS]
)
def test_running_ranks_hold_and_send_what_was_predicted(name):
    size, changes = LAYOUTS[name]
    dp = changes.get("dp", 1)
    model = "mixtral" if "model__experts" in changes else "gpt"
    made = config(model, **FLOAT | {key: value for key, value in changes.items() if key != "dp"})
    p = made.parallel
    layout = Layout(dp=dp, pp=p.pp, tp=p.tp, cp=p.cp, ep=p.ep, zero_ranks=p.zero_ranks)
    plan = predict(made, layout)
    of_ranks = [plan.ranks[layout.place(rank).pp] for rank in range(size)]
    for _ in range(3):  # a message that ends late is held for longer, on a busy machine: then the run is measured again
        measured = on_world(size, held_and_sent, made)
        if all(planned.peak == pytest.approx(m["peak"], rel=0.1) for planned, m in zip(of_ranks, measured)):
            break
    for rank, (planned, found) in enumerate(zip(of_ranks, measured)):
        assert planned.peak == pytest.approx(found["peak"], rel=0.1), (rank, planned)
        for axis in ("tp", "cp", "pp"):
            assert planned.sent[axis] == pytest.approx(found[axis], rel=1e-3, abs=256), (
                rank,
                axis,
            )  # norms are summed over pp too
        if layout.replica > 1:
            rel = 0.1 if p.zero_stage == 3 else 0.02  # of ties and the last piece
            assert planned.sent["dp"] == pytest.approx(found["dp"], rel=rel)


def test_a_rank_holds_no_more_for_more_microbatches():
    """gloo never says that a send is over: a rank that waits for it to say so keeps all that it has sent."""
    peaks = [
        [
            found["peak"]
            for found in on_world(2, held_and_sent, config("gpt", **{**FLOAT, "train__global_batch": batch}, pp=2))
        ]
        for batch in (4, 10)
    ]
    for few, many in zip(*peaks):
        assert many == pytest.approx(few, rel=0.01)
