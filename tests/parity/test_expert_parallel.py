"""Expert parallelism: experts cut over ranks, tokens sent to them and back. Every layout of it computes what one
process computes."""

from pathlib import Path

import pytest
import torch
from cases import SCHEDULE, alone, case, compare
from models import config
from safetensors import safe_open
from test_deepspeed import one_run

from roots_dist.assembly.passes import build_passes
from roots_dist.assembly.run import build_run
from roots_dist.checks.checks import layout_for
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError
from roots_dist.layout import Layout
from roots_dist.learning.models.experts import Experts
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.optim.trainable import trainable
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.runs.evaluate.harness_model import token_scores
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.plan.rank_cost import count_rank_cost
from roots_dist.runs.train.expert_load import expert_loads, load_metrics
from roots_dist.runs.train.step import train_step
from roots_dist.schedule.actions import Kind
from roots_dist.testing.parity import FLOAT64_BOUNDS, differences, merge, trace
from roots_dist.testing.watcher import Watcher, reads_counted
from roots_dist.testing.world import on_warm_world
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import initialize, parameters_of

SP = dict(tp=2, sequence_parallel=True)
SIX, EIGHT = dict(model__experts=6), dict(model__experts=8)
LORA = dict(
    finetune__strategy="lora", finetune__lora_rank=3, finetune__lora_targets=["query", "up", "down"], **SIX
)  # fmt: skip
BIASED = dict(
    model__router_bias=True, model__expert_groups=3, model__groups_per_token=2, optim__router_bias_rate=0.05
)  # fmt: skip
CASES = [
    case("mixtral", dp=2, ep=2, zero_stage=0, **SIX),
    case("mixtral", dp=4, ep=4, zero_stage=0, model__experts=4),  # one on each rank
    case("mixtral", dp=4, ep=2, zero_stage=1, **SIX),
    case("mixtral", dp=4, ep=2, zero_stage=3, **SIX),
    case("mixtral", dp=4, ep=2, zero_stage=2, full=True, **SIX),
    case("mixtral", dp=2, cp=2, ep=4, zero_stage=0, **EIGHT),
    case("qwen-moe", dp=2, ep=2, **SP, **SIX, **BIASED),
    case("qwen-moe", dp=2, pp=2, ep=2, schedule="zb-h1", train__recompute="full", **SIX),
    case("mixtral", dp=2, pp=2, ep=2, **SP, zero_stage=1, train__recompute="full", train__global_batch=16, **SIX),
    *(
        case(model, **layout, **more, zero_stage=zero, full=True, train__global_batch=16, **EIGHT)
        for layout in (dict(dp=2, ep=2), dict(dp=4, ep=2), dict(dp=4, ep=4))
        for more in ({}, dict(tp=2), SP, dict(pp=2), dict(cp=2))
        for zero in (0, 1)
        for model in ("mixtral", "qwen-moe")
    ),
    case("mixtral", cp=4, ep=2, zero_stage=1, full=True, **SIX),
    case("mixtral", cp=4, ep=4, zero_stage=0, full=True, **EIGHT),
    case("mixtral", dp=2, ep=2, **SP, zero_stage=3, full=True, **SIX),
    case("mixtral", dp=2, pp=2, ep=2, zero_stage=2, full=True, train__global_batch=16, **SIX),
    case("mixtral", dp=2, cp=2, ep=4, zero_stage=3, full=True, **EIGHT),
    *(case("qwen-moe", dp=2, ep=2, zero_stage=zero, full=True, **SIX, **BIASED) for zero in (0, 1, 2, 3)),
    case("qwen-moe", dp=2, pp=2, full=True, **SIX, **BIASED),
    case("mixtral", dp=2, pp=2, cp=2, ep=4, zero_stage=1, full=True, train__global_batch=16, **EIGHT),
    *(case("qwen-moe", dp=2, pp=2, ep=2, full=True, **keys, **EIGHT) for keys in list(SCHEDULE.values())[1:]),
]


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_where_experts_are(case):
    compare(case)


def test_adapters_of_experts_are_cut_as_these_are():
    (made,) = case("mixtral", dp=2, ep=2, train__recompute="selective", **LORA).values
    compare(made)


def test_a_run_goes_on_with_other_ranks_for_its_experts(tmp_path):
    """A checkpoint has each expert under its number, whoever held it: begun on four ranks, gone on in one process, and
    then on two tensor ranks of each of two halves."""
    parts, before, biased = [], None, dict(model__router_bias=True)
    layouts = (4, dict(ep=4, zero_stage=1)), (1, {}), (4, dict(ep=2, tp=2))
    for step, (size, parallel) in enumerate(layouts):
        here = config("mixtral", **EIGHT, **biased, **{f"parallel__{key}": value for key, value in parallel.items()})
        after = str(tmp_path / str(step))
        parts.append(merge(on_warm_world(size, trace, here, step, step + 1, before, after)))
        (folder,) = (Path(after) / "checkpoints").iterdir()
        files = (safe_open(file, framework="pt") for file in folder.glob("model-*.safetensors"))
        kept = [name for file in files for name in file.keys() if ".experts." in name]  # noqa: SIM118 # no mapping
        assert len(kept) == len({*kept}) == 4 * 8 * 3, "of four layers, eight experts, three matrices"
        before = str(folder)
    rows = differences(alone(config("mixtral", **EIGHT, **biased), 3), one_run(*parts), FLOAT64_BOUNDS)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


def test_some_experts_of_a_layer_do_not_learn_alone_on_several_ranks():
    """Backward sends nothing from a rank on which nothing learns: the others would wait for it."""
    depths = {f"blocks.0.mlp.experts.{number}.up.weight": 1 for number in range(6)}
    partial = dict(finetune__strategy="partial", finetune__trainable=["*.experts.1.*", "*.experts.4.*"])
    made = config("mixtral", parallel__ep=2, **SIX, **partial)
    with pytest.raises(ConfigError, match=r"not some of blocks\.0\.mlp\.experts\.\*\.up\.weight"):
        trainable(made, depths)
    assert len(trainable(made.changed({"parallel.ep": 1}), depths)) == 2
    assert len(trainable(made.changed({"finetune.trainable": ["*.experts.*"]}), depths)) == 6


def test_ranks_of_experts_send_what_the_document_says():
    """Per layer and microbatch: the sizes of the parts, K copies of each token, and as many outputs; in backward the
    gradients of both. With full recomputation, copies and outputs once more, and the sizes not: they are kept."""
    b, s, k, d, bytes_of, experts = 1, 16, 2, 32, 8, 8
    copies = ("all_to_all", b * s * k * d * bytes_of)

    def sent(kind: Kind, **changes: object) -> list[tuple[str, int]]:
        made = config("mixtral", parallel__ep=4, parallel__zero_stage=0, model__layers=1, **EIGHT, **changes)
        messages = count_rank_cost(made, Layout(dp=4, ep=4), 0).stages[0].passes[kind].messages
        return [(m.operation, m.bytes) for m in messages if m.axis == "ep"]

    assert sent(Kind.FORWARD) == [("all_to_all", 8 * experts), copies, copies]
    assert sent(Kind.BACKWARD) == [copies, copies]
    assert sent(Kind.BACKWARD, train__recompute="full") == [copies] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_do_not_grow_with_the_number_of_experts_and_nothing_waits(dtype):
    """Two microbatches forward and backward, on one rank of experts. One after another, each expert has its own
    products."""

    def counted(experts: int, ffn: int = 16) -> tuple[int, int]:
        sizes = dict(model__hidden=16, model__heads=2, model__ffn=ffn, model__experts=experts)
        made = config("mixtral", **sizes, advanced__float64=False)
        module = Experts(made, TensorParallel(), "blocks.0", init_stds(made)).to(dtype)
        module.pack()
        initialize(parameters_of([("blocks.0.mlp", module)]), 3)
        with Watcher() as watcher, reads_counted(watcher):
            for number in range(2):
                x = torch.randn(2, 8, 16, dtype=dtype, requires_grad=True)
                batch = MicroBatch(tokens=torch.ones(2, 8, dtype=torch.int64), sample_ids=torch.arange(2), step=number)
                module(x, batch, [])[0].sum().backward()
        return sum(watcher.launches.values()), sum(watcher.waits.values())

    assert counted(4) == counted(16)
    assert counted(4)[1] == 0
    assert counted(16, ffn=9)[0] > counted(4, ffn=9)[0] + 12 * 2 * 6, "a width without a kernel"


def loads_of_a_step(rank: int, size: int, made: Config) -> dict[str, list[int]]:
    mesh = Mesh.connect(layout_for(made, size), rank)
    run = build_run(made, mesh, objective=proof_objective(made))
    train_step(run, random_batches(made, 0, mesh.dp.rank, mesh.dp.size), 1e-3)
    return expert_loads(run)


def test_loads_are_those_of_all_ranks_and_counted_once():
    """Whatever the layout, and whether or not a block is computed again."""
    layout = dict(parallel__tp=2, parallel__pp=2, parallel__ep=2, parallel__schedule="1f1b", train__recompute="full")
    made = config("qwen-moe", **layout, **SIX)
    (alone,) = on_warm_world(1, loads_of_a_step, config("qwen-moe", **SIX))
    together = on_warm_world(8, loads_of_a_step, made)
    assert together == [alone] * 8
    assert [*alone] == ["blocks.1", "blocks.2", "blocks.3"], "the first block is dense"
    assert {sum(counts) for counts in alone.values()} == {8 * 16 * 3}, "three experts of each token, none dropped"


def generated(rank: int, size: int, made: Config) -> dict[str, object]:
    """What is sampled, and how likely texts are, whose number the ranks do not divide."""
    passes = build_passes(made, Mesh.connect(layout_for(made, size), rank))
    texts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    answers = decode(passes, texts, Request(max_tokens=6, samples=2, rows=2))
    scores = token_scores(passes, [(text, [20, 21]) for text in texts], made.data.seq_length)
    return {"tokens": [[answer.tokens for answer in of_text] for of_text in answers], "scores": scores}


@pytest.mark.parametrize(
    "model, size, axes", [("mixtral", 4, {"parallel.ep": 2, "parallel.tp": 2}), ("llama", 2, {"parallel.cp": 2})]
)
def test_generation_and_scores_of_texts_are_those_of_one_process(model, size, axes):
    """Ranks that send each other tokens read the same texts: none waits for one that has no more. Context ranks read
    other texts, each whole."""
    made = config(model, **(SIX if model == "mixtral" else {}))
    (alone,) = on_warm_world(1, generated, made)
    for found in on_warm_world(size, generated, made.changed(axes)):
        assert found["tokens"] == alone["tokens"]
        for (score, is_best), (wanted, was_best) in zip(found["scores"], alone["scores"], strict=True):
            assert score == pytest.approx(wanted, abs=1e-10) and is_best == was_best


def test_what_loads_say():
    found = load_metrics({"blocks.0": [4, 4, 4, 4], "blocks.1": [16, 0, 0, 0], "blocks.2": [0, 0, 0, 0]})
    assert found == {
        "experts/largest_load": 4.0, "experts/smallest_load": 0.0, "experts/entropy": 0.5, "experts/dropped": 0.0,
    }  # fmt: skip
    assert load_metrics({}) == {}
