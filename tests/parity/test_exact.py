"""With train.exact no bit of a run depends on its layout: digests of loss, norm, weights, moments after every step."""

import functools
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import config

from roots_dist.assembly.run import build_run
from roots_dist.checks.checks import check_used
from roots_dist.config.schema import Config
from roots_dist.config.sections import OptimConfig
from roots_dist.errors import ConfigError
from roots_dist.layout import Layout
from roots_dist.learning.models.activations import FUNCTIONS
from roots_dist.learning.models.attention import Attention
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.learning.models.norms import Norm
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.optim import norm as optim_norm
from roots_dist.parallel.optim.groups import Group, exact_update, initial_state
from roots_dist.parallel.optim.norm import exact_group_norms
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.tensor.by_positions import ADD, by_positions
from roots_dist.parallel.tensor.collectives import TensorParallel, start_all_reduce, start_reduce_scatter
from roots_dist.parallel.tensor.exact import Shard, by_shards
from roots_dist.parallel.tensor.weight_gradient import weight_gradient
from roots_dist.parallel.zero import reference
from roots_dist.runs.plan.cluster_speed import ring_bytes
from roots_dist.runs.plan.rank_cost import RecordingGroup
from roots_dist.runs.train.step import train_step
from roots_dist.storage.checkpoint.same_model import refuse_other_bits
from roots_dist.testing.bits import Bits, first_difference, merge_bits, trace_bits
from roots_dist.testing.world import on_warm_world
from roots_dist.verify.exact import exact_row
from roots_dist.world.exact import Exact
from roots_dist.world.mesh import SINGLE, Axis, Mesh
from roots_dist.world.tree_sum import RunningTreeSum, start_tree_reduce_scatter, tree_all_reduce, tree_sum

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)]
"""Each with its virtual stages."""
TIMEOUT_S = 600
LATE = Path(__file__).parents[2] / "configs" / "late.py"
EXACT = dict(advanced__float64=False, train__micro_batch=1, optim__lr=1e-2)
"""Changes of every case, beside what models.py has: dropout and clipping act, and a step has several microbatches."""


Degrees = tuple[int | str, ...]
"""Tensor and data shards, and context shards if there are some; and what else two groups of layouts differ by."""


def exact(model: str, degrees: Degrees, **changes: object) -> Config:
    numbers = [number for number in degrees if isinstance(number, int)]
    values = EXACT | {"train__exact": dict(zip(("tensor", "data", "context"), numbers))} | changes
    return config(model, **{key if "__" in key else f"parallel__{key}": value for key, value in values.items()})


@functools.cache
def _alone(config: Config, steps: int) -> list[Bits]:
    return merge_bits([trace_bits(0, 1, config, 0, steps)])


def of_layout(model: str, degrees: Degrees, changes: dict[str, object]) -> tuple[Config, int]:
    """The config, and its number of ranks."""
    layout = exact(model, degrees, **{key: value for key, value in changes.items() if key != "dp"})
    ranks = layout.parallel.ranks_per_sample() * changes.get("dp", 1)
    assert not check_used(layout, ranks)
    return layout, ranks


def bits(model: str, degrees: Degrees, steps: int, changes: dict[str, object]) -> list[Bits]:
    layout, ranks = of_layout(model, degrees, changes)
    return merge_bits(on_warm_world(ranks, trace_bits, layout, 0, steps, timeout=TIMEOUT_S))


def digest_of_run(found: list[Bits]) -> str:
    """The digest of loss, norm, weights and moments after every step."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]


def compare(model: str, degrees: Degrees, steps: int, changes: dict[str, object]) -> None:
    """One process, and a layout: `dp` is a number of ranks, a key without its section is one of `parallel`, and all
    other changes are of both."""
    values = {key: value for key, value in changes.items() if "__" in key}
    alone, found = _alone(exact(model, degrees, **values), steps), bits(model, degrees, steps, changes)
    assert first_difference(alone, found) is None
    assert len(set(map(str, found))) == steps  # and each step changes something


DEEPSEEK = dict(
    model__heads=8,
    model__dropout=0.1,
    model__experts=6,
    model__expert_ffn=16,
    model__shared_expert_ffn=24,
    model__expert_groups=3,
    model__groups_per_token=2,
    model__router_bias=True,
    optim__router_bias_rate=0.05,
    objective__router_z_loss=0.01,
)
"""Makes a mixture with a shared expert like DeepSeek-V3, but for its attention. Eight shards divide its widths."""


def learned(made: Config) -> dict[str, torch.Tensor]:
    """Losses and weights of three steps in one process."""
    run = build_run(made, Mesh.single(), objective=proof_objective(made))
    terms = [train_step(run, random_batches(made, step, 0, 1), 1e-2).terms for step in range(3)]
    losses = torch.tensor([[*step.values()] for step in terms], dtype=torch.float64)
    return {"losses": losses, **{p.name: p.tensor.detach() for p in run.params}}


@pytest.mark.parametrize(
    "model, degrees",
    [
        ("gpt", (2, 2)),
        ("llama", (2, 2, 2)),
        ("bert", (2, 2, 2)),
        ("t5", (2, 2)),
        ("electra", (2, 2, 2)),
        ("qwen-moe", (2, 2, 2)),
    ],
)
def test_an_exact_run_computes_what_a_plain_one_does(model, degrees):
    """All layouts could be equal, and wrong."""
    more = dict(advanced__float64=True, train__micro_batch=2, train__global_batch=4)
    more |= dict(model__layers=2) if model in ("gpt", "llama", "qwen-moe") else {}
    more |= DEEPSEEK if model == "qwen-moe" else {}
    plain, found = learned(exact(model, (), **more, train__exact=None)), learned(exact(model, degrees, **more))
    assert found.keys() == plain.keys()
    far = {name: float((found[name] - plain[name]).abs().max()) for name in plain}
    assert max(far.values()) < 1e-10, max(far, key=far.get)


CUT = dict(model__layers=2, model__experts=8, model__expert_ffn=36)
"""Experts of widths for which no grouped kernel is there: 18 on each of two tensor ranks."""
OF_RANK_3 = dict(finetune__strategy="lora", finetune__lora_rank=3, finetune__lora_targets=["up", "down"])
SAMPLE = [
    ("gpt", (2, 2), dict(dp=2, tp=2, sequence_parallel=True, zero_stage=1)),
    ("llama", (4, 2), dict(tp=2, pp=2, schedule="zb-h1", train__precision="bf16", model__tied_embeddings=True)),
    (
        "llama+lora",
        (2, 1),
        dict(tp=2, sequence_parallel=True, train__precision="bf16", train__global_batch=2, model__layers=2),
    ),
    ("gpt", (2, 2, 2), dict(cp=2, train__global_batch=4, model__layers=2)),
    ("qwen-moe", (4, 1), DEEPSEEK | dict(tp=2, pp=2, schedule="zb-h1", train__global_batch=2, model__layers=2)),
    ("mixtral", (1, 1, 2), dict(cp=2, train__global_batch=2, model__layers=2)),
    ("mixtral", (2, 4), dict(dp=2, ep=2, tp=2, zero_stage=1) | CUT),
    ("mixtral", (1, 2), dict(dp=2, ep=2, train__precision="bf16", train__micro_batch=2) | CUT | OF_RANK_3),
    ("mixtral", (1, 1, 2), dict(cp=2, ep=2, train__global_batch=2) | CUT | dict(model__layers=1)),
]
MODELS = {
    "gpt": dict(model__heads=8),
    "llama": {},  # eight shards of two key/value heads
    "llama+lora": {},
    "bert": dict(model__heads=8),
    "t5": dict(model__heads=8, model__head_dim=4, model__layers=2, model__decoder_layers=2),
    "electra": dict(generator__heads=8, generator__layers=1),
    "mixtral": dict(model__experts=8),
    "qwen-moe": DEEPSEEK | dict(model__experts=12),
}
"""The models of the table, and what lets eight shards divide them."""
ALONE = "one process"
TABLE = {
    (8, 1): {
        "tp 2": dict(tp=2),
        "tp 2, SP": dict(tp=2, sequence_parallel=True),
        "tp 4, SP, blocks recomputed": dict(tp=4, sequence_parallel=True, train__recompute="full"),
        "tp 8": dict(tp=8),
        "tp 8, SP": dict(tp=8, sequence_parallel=True),
    },
    (1, 8): {
        "dp 2, ZeRO 0": dict(dp=2, zero_stage=0),
        "dp 4, ZeRO 1": dict(dp=4, zero_stage=1),
        "dp 4, ZeRO 2, activations recomputed": dict(dp=4, zero_stage=2, train__recompute="selective"),
        "dp 8, ZeRO 3": dict(dp=8, zero_stage=3),
    },
    (1, 1): {
        f"pp {pp}, {name}": dict(pp=pp, schedule=name, virtual_stages=v)
        for pp in (2, 4)
        for name, v in SCHEDULES
        if pp * v < 8
    },
    (4, 2): {
        "tp 2, SP × pp 2, zb-h1 × dp 2, ZeRO 1": dict(
            tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1, schedule="zb-h1"
        ),
        "tp 2 × pp 2, interleaved × dp 2, ZeRO 3": dict(
            tp=2, pp=2, dp=2, zero_stage=3, schedule="interleaved", virtual_stages=2
        ),
        "tp 4 × dp 2, ZeRO 2": dict(tp=4, dp=2, zero_stage=2),
    },
    (2, 2, 4): {
        "cp 4": dict(cp=4),
        "cp 2 × dp 2, ZeRO 1": dict(cp=2, dp=2, zero_stage=1),
        "cp 4 × dp 2, ZeRO 3": dict(cp=4, dp=2, zero_stage=3),
        "tp 2, SP × dp 2, ZeRO 2": dict(tp=2, dp=2, sequence_parallel=True, zero_stage=2),
        "tp 2, SP × cp 2 × pp 2, zb-h1": dict(tp=2, cp=2, pp=2, sequence_parallel=True, schedule="zb-h1"),
        "tp 2, SP × cp 4, blocks recomputed": dict(tp=2, cp=4, sequence_parallel=True, train__recompute="full"),
    },
    (1, 1, "eight stages"): {"pp 4, interleaved": dict(pp=4, schedule="interleaved", virtual_stages=2)},
}
"""Degrees -> layouts in words, each of which must have the bits of one process with these degrees."""
OF_EXPERTS = {
    (1, 8): {
        "dp 4, ep 4, ZeRO 0": dict(dp=4, ep=4, zero_stage=0),
        "dp 8, ep 4, ZeRO 2": dict(dp=8, ep=4, zero_stage=2),
    },
    (4, 2): {
        "tp 2, SP × pp 2, zb-h1 × dp 2, ep 2, ZeRO 1": dict(
            tp=2, pp=2, dp=2, ep=2, sequence_parallel=True, zero_stage=1, schedule="zb-h1"
        ),
    },
    (2, 2, 4): {
        "cp 4, ep 4": dict(cp=4, ep=4),
        "cp 2 × dp 2, ep 4, ZeRO 3": dict(cp=2, dp=2, ep=4, zero_stage=3),
        "tp 2, SP × cp 4, ep 4, blocks recomputed": dict(
            tp=2, cp=4, ep=4, sequence_parallel=True, train__recompute="full"
        ),
    },
}
"""More layouts, of models that have experts."""
BATCHES = {8: 8, 2: 4, 1: 4}
"""Data shards -> microbatches of a step."""
STEPS = 20


@pytest.mark.parametrize("model, degrees, changes", SAMPLE)
def test_no_bit_depends_on_the_layout(model, degrees, changes):
    compare(model, degrees, 2, changes)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("degrees", TABLE, ids=lambda degrees: "-".join(map(str, degrees)))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_no_bit_depends_on_any_layout(model, precision, degrees, record_property):
    """The digests of the runs are recorded: docs/make_exact.py makes a table of them."""
    values = MODELS[model] | {"train__precision": precision, "train__steps": STEPS}
    values |= {"train__global_batch": BATCHES[degrees[1]]}
    if "eight stages" in degrees:
        values |= dict(model__layers=4, model__decoder_layers=4) if model == "t5" else dict(model__layers=8)
    alone = _alone(exact(model, degrees, **values), STEPS)
    assert len(set(map(str, alone))) == STEPS  # each step changes something
    record_property(ALONE, digest_of_run(alone))
    differ = {}
    layouts = TABLE[degrees] | (OF_EXPERTS.get(degrees, {}) if "model__experts" in values else {})
    for name, changes in layouts.items():
        found = bits(model, degrees, STEPS, values | changes)
        record_property(name, digest_of_run(found))
        differ[name] = first_difference(alone, found)
    assert not any(differ.values()), differ


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_bit_depends_on_resumes(precision, tmp_path):
    """One run over 1, 8, 2 and 4 processes, against one that was left alone."""
    steps, values = 3, {"train__precision": precision, "train__steps": 12}
    layouts = [
        {},
        dict(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1),
        dict(tp=2),
        dict(dp=2, pp=2, zero_stage=3, schedule="zb-h1"),
    ]
    found: list[Bits] = []
    for number, changes in enumerate(layouts):
        layout, ranks = of_layout("gpt", (4, 4), changes | values)
        source = str(tmp_path / str(number)) if number else None
        target, first = str(tmp_path / str(number + 1)), number * steps
        ranks_bits = on_warm_world(ranks, trace_bits, layout, first, first + steps, source, target, timeout=TIMEOUT_S)
        found += merge_bits(ranks_bits)
    assert first_difference(_alone(exact("gpt", (4, 4), **values), 12), found) is None


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_no_bit_depends_on_where_a_shard_of_channels_ends(name):
    """Vector body and scalar tail of a kernel round otherwise, so that a shard's tail is computed as one everywhere."""
    function = FUNCTIONS[name]
    one_process = TensorParallel(exact=Exact(4, 1, 1, 1))
    for shards in torch.randn(64, 4, 15, generator=torch.Generator().manual_seed(1)):
        found = by_shards(one_process, function, torch.cat(list(shards)))
        assert torch.equal(found, torch.cat([function(shard.clone()) for shard in shards]))


def test_no_bit_depends_on_where_the_gradient_of_a_shard_lies():
    """A product is added to columns of a matrix by another kernel than to a matrix of as many."""
    whole, draw = Exact(4, 1, 1, 1), torch.Generator().manual_seed(1)
    one_process, a_rank = TensorParallel(exact=whole), TensorParallel(exact=Exact(4, 4, 1, 1))
    parameter, own = (torch.nn.Parameter(torch.empty(32, n)) for n in (40, 10))
    for weight in (parameter, own):
        weight.grad_dtype = torch.float32
    up, x = (torch.randn(16, n, generator=draw) for n in (32, 10))
    shard = Shard(whole, parameter, (slice(None), slice(10, 20)))
    for _ in range(2):
        weight_gradient(one_process, shard, up, x)
        weight_gradient(a_rank, own, up, x)
    assert torch.equal(shard.grad, own.grad)


class Biased(torch.nn.Module):
    def __init__(self, tp: TensorParallel):
        super().__init__()
        self.tp, self.bias = tp, torch.nn.Parameter(torch.empty(37))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_positions(self.tp, ADD, x, self.bias)


ROWS = {
    "bias": Biased,
    "layernorm": lambda tp: Norm(Config.model_validate({"model": {"norm": "layernorm"}}), tp, 37),
    "rmsnorm": lambda tp: Norm(Config.model_validate({"model": {"norm": "rmsnorm"}}), tp, 37),
    "no weight": lambda tp: Norm(Config.model_validate({"model": {"norm_affine": False}}), tp, 37),
}


@pytest.mark.parametrize("texts, learns", [(3, True), (1, False)], ids=["three texts", "one text, frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ROWS)
def test_no_bit_depends_on_how_many_rows_are_computed_together(what, dtype, texts, learns):
    """Four runs of positions in one process, and each on its own: as a rank under sequence parallelism has it. Without
    it each of four ranks has all, and the gradients of its own run."""
    one_process, a_rank, draw = Exact(4, 1, 1, 1), Exact(4, 4, 1, 1), torch.Generator().manual_seed(1)
    layouts = TensorParallel(exact=one_process), TensorParallel(exact=a_rank, sequence_parallel=True)
    together, alone = (ROWS[what](tp).to(dtype) for tp in layouts)
    for ours, theirs in zip(together.parameters(), alone.parameters()):
        ours.data.copy_(torch.randn(37, generator=draw))
        theirs.data, ours.grad_dtype, theirs.grad_dtype = ours.data, torch.float32, torch.float32
        ours.requires_grad_(learns), theirs.requires_grad_(learns)
    x, up = (torch.randn(texts, 20, 37, generator=draw).to(dtype) for _ in range(2))
    x.requires_grad_(True)
    y = together(x)
    y.backward(up)
    for part, (run, up_run) in enumerate(zip(x.detach().chunk(4, 1), up.chunk(4, 1))):
        a_rank.begin(1)
        own = run.clone().requires_grad_(True)
        found = alone(own)
        found.backward(up_run.clone())
        assert torch.equal(found, y.chunk(4, 1)[part]) and torch.equal(own.grad, x.grad.chunk(4, 1)[part])
        for ours, theirs in zip(together.parameters(), alone.parameters()):
            assert torch.equal(one_process.gradient(ours, part), a_rank.gradient(theirs))
        a_rank.begin(1)
        alone.tp = TensorParallel(axis=Axis("tp", 4, part, tuple(range(4)), None), exact=a_rank)
        whole = x.detach().clone().requires_grad_(True)
        found = alone(whole)
        found.backward(up)
        alone.tp = layouts[1]
        assert torch.equal(found, y) and torch.equal(whole.grad, x.grad)
        for ours, theirs in zip(together.parameters(), alone.parameters()):
            assert torch.equal(one_process.gradient(ours, part), a_rank.gradient(theirs))
            assert not learns or not a_rank.gradient(theirs, part=1).any()


def test_no_bit_depends_on_how_many_heads_are_attended_together():
    """torch chooses a kernel for a batch of bf16 products by the size of all of them together."""
    run = exact("gpt", (4, 1), train__precision="bf16", model__heads=16, model__hidden=64)
    (batch, *_), draw = random_batches(run, 0, 0, 1), torch.Generator().manual_seed(1)

    def attention(rank: int | None) -> Attention:
        """The attention of one process, or of one of four tensor ranks."""
        axis = SINGLE if rank is None else Axis("tp", 4, rank, tuple(range(4)), None)
        return Attention(
            run, TensorParallel(axis, exact=Exact(4, axis.size, 1, 1)), "a", None, init_stds(run), causal=True
        )

    together, alone = attention(None), [attention(rank) for rank in range(4)]
    for _ in range(20):
        up, *qkv = (torch.randn(1, 16, 64, generator=draw).mul_(4).bfloat16() for _ in range(4))
        whole = [x.requires_grad_() for x in qkv]
        mixed = together.mix(*whole, batch)
        mixed.backward(up)
        for rank, own in enumerate(alone):
            mine = [x.detach().chunk(4, -1)[rank].clone().requires_grad_() for x in whole]
            found = own.mix(*mine, batch)
            found.backward(up.chunk(4, -1)[rank].clone())
            pairs = [(found, mixed), *((x.grad, of_all.grad) for x, of_all in zip(mine, whole))]
            assert all(torch.equal(ours, theirs.chunk(4, -1)[rank]) for ours, theirs in pairs)


def test_no_bit_depends_on_where_a_tensor_ends_that_adamw_steps():
    lengths = [16, 37, 5, 1, 64, 21]
    group = Group(Trainable(0, 1.0), decays=True)

    def stepped(cut: list[int]) -> list[torch.Tensor]:
        """Weight and moments after two steps of tensors of these lengths, end to end."""
        draw = torch.Generator().manual_seed(1)
        first = torch.randn(144, generator=draw).split(cut)
        weights, states = [torch.nn.Parameter(part.clone()) for part in first], [initial_state(part) for part in first]
        for _ in range(2):
            for weight, part in zip(weights, torch.randn(144, generator=draw).split(cut)):
                weight.grad = part.clone()
            with torch.no_grad():
                exact_update(OptimConfig(), group, 1e-2, weights, states)
        return [torch.cat(row) for row in (weights, *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq")))]

    assert all(map(torch.equal, stepped([144]), stepped(lengths)))


@pytest.mark.parametrize("is_exact", [False, True])
def test_a_run_steps_by_the_rule_of_its_kind(is_exact, monkeypatch):
    """Tensors of the small models above end where the rules round alike."""
    made = exact("gpt", (1, 1)) if is_exact else config("gpt")
    run, stepped = build_run(made, Mesh.single(), objective=proof_objective(made)), []
    for name in ("update", "exact_update"):
        monkeypatch.setattr(reference, name, lambda *of, name=name: stepped.append(name))
    train_step(run, random_batches(made, 0, 0, 1), 1e-3)
    assert set(stepped) == {"exact_update" if is_exact else "update"}


def test_the_norm_is_the_same_sum_in_any_order(monkeypatch):
    draw = torch.Generator().manual_seed(1)
    numbers = torch.randn(100_000, generator=draw) * 10 ** torch.randn(100_000, generator=draw)
    mixed, counted = numbers[torch.randperm(100_000, generator=draw)], SimpleNamespace(is_counted=True)

    def norm(*gradients: torch.Tensor) -> float:
        return exact_group_norms([[(counted, g) for g in gradients]], [], torch.device("cpu"))[0]

    of_many = norm(mixed[:40_000], *mixed[40_000:60_000].split(7), mixed[:0], mixed[60_000:].view(4, -1))
    assert norm(numbers) == of_many == pytest.approx(numbers.double().norm().item(), rel=1e-14)
    half = numbers[:9].bfloat16()
    assert norm(half, numbers[9:]) == norm(half.float(), numbers[9:])
    assert norm(numbers * 0) == 0 and norm() == 0
    monkeypatch.setitem(optim_norm.BLOCKS, "cpu", 1 << 24)  # as on a device that computes all at one time
    assert norm(numbers) == of_many
    for wrong in (math.inf, -math.inf, math.nan):
        assert norm(numbers, torch.tensor([1.0, wrong])) == math.inf


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_tree_sends_no_more_bytes_than_a_ring(ranks):
    numbers = 64 * ranks
    for sum_up, operation in ((tree_all_reduce, "all_reduce"), (start_tree_reduce_scatter, "reduce_scatter")):
        group = RecordingGroup(ranks)
        sum_up(torch.zeros(numbers), Axis("tp", ranks, 0, tuple(range(ranks)), group))
        sent = sum(ring_bytes(m.operation, m.bytes, ranks) for m in group.messages)
        assert sent == ring_bytes(operation, 4 * numbers, ranks)


@pytest.mark.parametrize(
    "sum_up, is_exact, operations",
    [
        (start_reduce_scatter, False, ["reduce_scatter"]),
        (start_reduce_scatter, True, ["all_to_all"]),
        (start_all_reduce, False, ["all_reduce"]),
        (start_all_reduce, True, ["all_to_all", "all_to_all"]),
    ],
)
def test_ranks_sum_in_an_order_where_a_run_is_exact(sum_up, is_exact, operations):
    """Two ranks have but one order, and none of four is that of a tree where the library chooses it."""
    group = RecordingGroup(4)
    tp = TensorParallel(Axis("tp", 4, 0, tuple(range(4)), group), exact=Exact(4, 4, 1, 1) if is_exact else None)
    sum_up(torch.zeros(2, 8, 3), tp)()
    assert [message.operation for message in group.messages] == operations


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_chunk_of_positions_belongs_to_its_shard(ranks):
    """Shard c of C has the chunks c and 2C-1-c of 2C."""
    for rank in range(ranks):
        cp = Axis("cp", ranks, rank, tuple(range(ranks)))
        tp = TensorParallel(cp=cp, exact=Exact(1, 1, 1, 1, context=4, cp=cp))
        held = 4 // ranks
        for number in range(held):
            shard = rank * held + number
            assert [tp.shard_of(range(3 * c, 3 * c + 3)) for c in (shard, 7 - shard)] == [number, number]


def sums_of_few(rank: int, size: int) -> list[torch.Tensor]:
    mesh = Mesh.connect(Layout(tp=size), rank)
    return [tree_all_reduce(torch.arange(1.0, n + 1) * (rank + 1), mesh.tp) for n in range(1, 7)]


def test_fewer_numbers_than_ranks_are_summed_too():
    """Also where ranks do not divide their number."""
    for found in on_warm_world(4, sums_of_few):
        assert [one.tolist() for one in found] == [[10.0 * i for i in range(1, n + 1)] for n in range(1, 7)]


def test_of_parts_in_order_few_sums_are_held():
    parts = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    running, most = RunningTreeSum(), 0
    for number, part in enumerate(parts):
        running.add(number, part.clone())
        most = max(most, len(running._held))
    assert most == 4 and torch.equal(running.total(), tree_sum(parts))


def test_a_differing_rank_is_named():
    truth = [{"loss": "a", "w[0:4] (weight)": "b"}, {"loss": "c", "w[0:4] (weight)": "d"}]
    other = [truth[0], truth[1] | {"w[0:4] (weight)": "e"}]
    row = exact_row("(weight)", truth, [{"steps": truth}, {"steps": other}])
    assert (row.passed, row.largest, row.where) == (False, 1, "step 1: w[0:4] (weight) on rank 1")
    assert exact_row("loss", truth, [{"steps": truth}, {"steps": other}]).passed


def test_a_resume_keeps_what_decides_the_bits(tmp_path):
    begun = exact("gpt", (4, 4))
    (tmp_path / "state.json").write_text(json.dumps({"config": begun.model_dump(mode="json"), "device": "cpu"}))
    refuse_other_bits(tmp_path, begun.changed({"parallel.tp": 2, "train.recompute": "full"}), "cpu")
    refuse_other_bits(tmp_path, begun.changed({"train.exact": None, "train.micro_batch": 2}), "cpu")
    others: list[tuple[str, object]] = [("train.micro_batch", 2), ("train.precision", "bf16")]
    others += [("train.exact", begun.train.exact.model_dump() | other) for other in ({"tensor": 2}, {"context": 2})]
    for key, value in others:
        with pytest.raises(ConfigError, match=key):
            refuse_other_bits(tmp_path, begun.changed({key: value}), "cpu")
    with pytest.raises(ConfigError, match="device"):
        refuse_other_bits(tmp_path, begun, "cuda")


MIXTURE = {"model.experts": 4, "model.mlp_bias": False}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"advanced.engine": "deepspeed"}, "advanced.engine"),
        (
            {"parallel.cp": 2},
            "context = 1: expected a multiple of parallel.cp = 2. Fix: choose one of 2, 4",
        ),
        ({"parallel.cp": 2, "parallel.cp_kind": "heads"}, "parallel.cp_kind = 'heads'"),
        (
            {"train.exact": {"context": 2}, "objective.name": "classify", "finetune.labels": ["a"]},
            "objective of tokens",
        ),
        (
            MIXTURE | {"parallel.cp": 4, "parallel.ep": 2, "train.exact": {"data": 4, "context": 4}},
            "parallel.ep = 2: expected 1, or a multiple of parallel.cp = 4 where a data rank has several data shards",
        ),
        (
            MIXTURE | {"parallel.ep": 2, "train.recheck_every": 5},
            "train.recheck_every = 5: expected 0 with parallel.ep above 1",
        ),
        ({"advanced.extensions": [str(LATE)], "parallel.schedule": "all-at-once"}, "parallel.schedule"),
    ],
)
def test_what_cannot_be_exact_is_refused(changes, words):
    problems = check_used(exact("gpt", (4, 4)).changed(changes), 4)
    assert any(words in str(problem) for problem in problems), problems


@pytest.mark.parametrize(
    "tensor, data, tp, expected, fits",
    [
        (3, 4, 1, "tensor = 3: expected a power of two", "1, 2, 4"),
        (1, 4, 2, "tensor = 1: expected a multiple of parallel.tp = 2", "2, 4"),
        (8, 4, 1, "tensor = 8: expected a divisor of model.heads = 4", "1, 2, 4"),
        (4, 12, 1, "data = 12: expected a power of two", "4, 8"),
        (4, 2, 1, "data = 2: expected a multiple of the number of data ranks, which is 4", "4, 8"),
        (
            4,
            16,
            1,
            "data = 16: expected every batch a multiple of train.micro_batch × train.exact.data = 16, and not 8",
            "4, 8",
        ),
    ],
)
def test_a_wrong_degree_is_answered_by_one_line(tensor, data, tp, expected, fits):
    wrong = exact("gpt", (tensor, data), tp=tp, train__global_batch=8)
    assert [str(p) for p in check_used(wrong, 4 * tp)] == [f"train.exact.{expected}. Fix: choose one of {fits}."]


def test_a_wrong_ramp_is_no_riddle_of_exact_runs():
    (problem,) = check_used(exact("gpt", (4, 4)).changed({"train.batch_ramp": (1, 0, 8)}), 4)
    assert problem.key == "train.batch_ramp"


def test_a_family_of_ones_own_is_refused(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from dataclasses import replace\nfrom roots_dist import Extension, NewFamily\n"
        "from roots_dist.config.families import FAMILIES\n"
        "mine = NewFamily(record=replace(FAMILIES['gpt'], name='mine'), pieces=print, objectives=('clm',))\n"
        "EXTENSION = Extension(families={'mine': mine})\n"
    )
    (problem,) = check_used(
        exact("gpt", (4, 4)).changed({"advanced.extensions": [str(own)], "model.family": "mine"}), 4
    )
    assert "model.family" in str(problem) and "a family of the package" in str(problem)
