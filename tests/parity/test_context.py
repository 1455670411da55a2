"""Context parallelism: positions cut over ranks, keys and values gathered. Every layout of it computes what one process
computes; every rank has the same work; what is sent and kept is what the documents say."""

import itertools
import weakref
from unittest import mock

import pytest
import torch
from cases import SCHEDULE, case, compare
from models import config
from torch.utils._python_dispatch import TorchDispatchMode

from roots_dist.layout import Layout
from roots_dist.learning.models.attention import Attention
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.learning.models.rotary import rotary_of
from roots_dist.parallel.tensor import context
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.context import Gather, num_groups
from roots_dist.runs.plan.passes import Pass
from roots_dist.runs.plan.rank_cost import RecordingGroup, count_rank_cost, fake_mesh
from roots_dist.schedule.actions import Kind
from roots_dist.testing.parity import trace
from roots_dist.testing.world import on_warm_world
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh
from roots_dist.world.positions import Positions, zigzag

SP = dict(tp=2, sequence_parallel=True)
BORDERS = dict(objective__reset_at_documents=True)
MANY = [
    ("llama", {}),
    ("gpt", {}),
    ("bloom", BORDERS),
    ("olmo", BORDERS),
    ("gemma", {}),
    ("bert", {}),
    ("electra", {}),
    ("t5", {}),
    ("llama-packed", {}),
    ("gpt-prefers", {}),
    ("gpt-classify", {}),
    ("gpt-tag", {}),
]
"""Grouped heads, fewer than four; attention dropout; borders across shards; windows; ALiBi; every kind of head."""
CASES = [
    case("llama", cp=4, model__attention_dropout=0.1),  # two key/value heads, four ranks
    case("bloom", cp=2, **BORDERS),
    case("gpt", cp=2, dp=2, zero_stage=1),
    case("electra", cp=2),
    case("t5", cp=2, full=True),  # as T5's tasks in the cover
    case("gpt-prefers", cp=2),
    case("mixtral", cp=2, **SP),
    case("deepseek", cp=2, cp_kind="heads", **BORDERS),
    case("deepseek", cp=2, **SP, **BORDERS, full=True),
    case("gemma", cp=2),
    case("bert-classify", cp=2),
    case("bloom", cp=4, cp_kind="heads", **BORDERS),
    case("t5", cp=2, cp_kind="heads"),  # a learned bias of heads, attention dropout, and another length of keys
    *(case(model, cp=2, cp_kind="heads", full=True, **more) for model, more in MANY if model not in ("t5", "bloom")),
    *(
        case(model, cp=2, cp_kind="heads", full=True, **SP, **more)
        for model, more in MANY
        if config(model).model.num_kv_heads() % 4 == 0
    ),
    *(case(model, cp=2, cp_kind="heads", pp=2, full=True) for model in ("llama", "t5")),
    case("olmo", cp=2, **SP, **BORDERS, full=True),
    case("llama", cp=2, dp=2, zero_stage=1, **SP, full=True),
    case("gpt", cp=4, tp=2, full=True),
    *(
        case(model, cp=4, full=True, **layout, **more)
        for layout in (SP, dict(pp=2), dict(dp=2, zero_stage=0))
        for model, more in MANY
    ),
    *(
        case(model, cp=4, pp=2, full=True, **more, **keys, train__global_batch=8)
        for keys in list(SCHEDULE.values())[1:]
        if keys["schedule"] != "1f1b"
        for model, more in MANY
    ),
    *(case(model, cp=4, full=True, **more) for model, more in MANY if model not in ("t5", "gpt-tag")),
    *(case(model, cp=2, full=True, **SP, **more) for model, more in MANY),
    *(
        case(model, cp=2, pp=2, full=True, **more, **keys, train__global_batch=8)
        for keys in list(SCHEDULE.values())[1:]
        for model, more in MANY
    ),
    *(
        case(model, cp=2, dp=2, zero_stage=zero, full=True, **more)
        for zero in (0, 1)
        for model, more in MANY[2 * zero :]
    ),
    *(case(model, cp=2, tp=2, pp=2, sequence_parallel=True, full=True, **more) for model, more in MANY),
]


def traced_in_groups(rank: int, size: int, *args: object) -> dict[str, object]:
    """Each key/value head is gathered alone, as if it were large. (cases.py's cover gathers all at once.)"""
    with mock.patch.object(context, "LEAST_BYTES", 1):
        return trace(rank, size, *args)


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_the_layout(case):
    compare(case, trace=traced_in_groups)


def test_heads_are_gathered_in_as_many_groups_as_are_large():
    mib = 1 << 20
    assert [num_groups(8, n * mib) for n in (1, 31, 32, 63, 64, 127, 128, 4096)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [num_groups(n, 4096 * mib) for n in (1, 2, 3, 6)] == [1, 2, 3, 6], "two heads of a rank are two groups"
    assert [num_groups(6, n * mib) for n in (48, 64, 80, 96)] == [3, 3, 3, 6], "of as many heads each"


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_rank_has_the_same_work_and_every_position_is_held_once(size):
    """Pairs of a query and a key that it sees. With one run of positions each, the last rank would have almost twice
    the mean."""
    seq = 48 * size
    held = [zigzag(seq, rank, size) for rank in range(size)]
    assert sorted(p for mine in held for p in mine.places(torch.device("cpu")).tolist()) == list(range(seq))
    pairs = [sum(p + 1 for r in mine.ranges for p in r) for mine in held]
    assert set(pairs) == {seq * (seq + 1) // 2 // size}
    assert sum(range(seq - seq // size + 1, seq + 1)) > (2 - 1.2 / size) * pairs[0]


def test_positions_are_cut_and_found():
    mine = zigzag(24, 1, 2)
    assert mine.ranges == (range(6, 12), range(12, 18)) and mine.part(1, 3).ranges == (range(10, 12), range(12, 14))
    early = zigzag(24, 0, 2)
    assert early.ranges == (range(6), range(18, 24)) and early.part(1, 2).after(100).ranges == (range(118, 124),)
    index, held = early.find(torch.tensor([5, 6, 18, 23]))
    assert index.tolist() == [5, 0, 6, 11] and held.tolist() == [True, False, True, True]
    whole = torch.arange(24)[None]
    assert early.of(whole)[0].tolist() == [*range(6), *range(18, 24)]
    assert zigzag(7, 0, 1) == Positions((range(7),))


def passes(**changes: object) -> tuple[Pass, Pass]:
    """Forward and backward of a block of a context rank, beside three others."""
    made = config("llama", parallel__cp=4, model__layers=1, **changes)
    found = count_rank_cost(made, Layout(cp=4), 0).stages[0].passes
    return found[Kind.FORWARD], found[Kind.BACKWARD]


def sent(**changes: object) -> list[list[tuple[str, int]]]:
    return [[(m.operation, m.bytes) for m in one.messages if m.axis == "cp"] for one in passes(**changes)]


def test_context_ranks_send_what_the_document_says(monkeypatch):
    """Per block and microbatch: keys and values of all positions are gathered, and gathered again in backward, where
    their gradients are summed over ranks. Nothing else, and in groups of heads no byte more."""
    b, g, s, head, bytes_of = 4, 2, 16, 4, 8
    whole = 2 * b * g * s * head * bytes_of  # K and V of the sequence
    queries, pairs = (b * number * s // 4 * head * bytes_of for number in (8, 2 * 4))
    forward, backward = sent(parallel__cp_kind="heads", model__kv_heads=4)
    assert forward == [("all_to_all", queries), ("all_to_all", pairs), ("all_to_all", queries)]
    assert sorted(backward) == sorted(forward), "one message for queries, one for keys and values"
    gather, add = ("all_gather", whole), ("reduce_scatter", whole)
    assert sent() == [[gather], [gather, add]]
    assert sent(train__recompute="full")[1] == [gather, add]
    monkeypatch.setattr(context, "LEAST_BYTES", 1)
    gather, add = ("all_gather", whole // 2), ("reduce_scatter", whole // 2)
    assert sent() == [[gather, gather], [gather, gather, add, add]]
    assert sent(train__recompute="full")[1] == [gather, gather, add, add]


def test_two_groups_of_heads_are_in_memory_at_once(monkeypatch):
    """One that attention runs on, and one that arrives: where keys and values weigh most, a plan's peaks fall so."""
    sizes = dict(model__kv_heads=8, data__seq_length=512)
    whole = 2 * 4 * 8 * 512 * 4 * 8
    at_once = passes(**sizes)
    monkeypatch.setattr(context, "LEAST_BYTES", 1)
    forward, backward = (before.peak_rise - now.peak_rise for before, now in zip(at_once, passes(**sizes)))
    assert forward > 1.4 * whole, "of two wholes, as they arrive and in order, a quarter is left"
    assert backward > 2 * whole, "and as much of their gradients"


class Spied(RecordingGroup):
    """Notes when a message leaves and when it is waited for, among the products that are computed."""

    def __init__(self, size: int, notes: list[str]):
        super().__init__(size, "cp")
        self.notes = notes

    def all_gather_single(self, out, tensor, opts=None):
        super().all_gather_single(out, tensor, opts)
        return Noted(self.notes, "gather")

    def reduce_scatter_single(self, out, tensor, opts=None):
        super().reduce_scatter_single(out, tensor, opts)
        return Noted(self.notes, "sum")


class Noted(torch.distributed.Work):
    def __init__(self, notes: list[str], what: str):
        super().__init__()
        self.notes, self.what = notes, f"{what} {sum(note.startswith(what) for note in notes)}"
        notes.append(self.what)

    def wait(self, timeout=None) -> bool:
        self.notes.append(f"wait for {self.what}")
        return True


class Products(TorchDispatchMode):
    def __init__(self, notes: list[str]):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.notes.append("product")
        elif "flash_attention" in func.overloadpacket.__name__:
            self.notes.append("attention")
        return func(*args, **(kwargs or {}))


def noted(**changes: object) -> tuple[list[str], list[str]]:
    """What a layer does, forward and backward; of several products, or kernels of attention, in a row one is noted."""
    made = config("llama", parallel__cp=2, model__attention_dropout=0.0, **changes)
    notes: list[str] = []
    mesh = fake_mesh(Layout(cp=2), 0, None, torch.device("cpu"), Spied(2, notes))
    tp = TensorParallel(cp=mesh.cp)
    layer = Attention(made, tp, "blocks.0.attention", rotary_of(made, "full"), init_stds(made), causal=True).double()
    x = torch.randn(1, 8, made.model.hidden, dtype=torch.float64, requires_grad=True)
    with Products(notes):
        y = layer(x, MicroBatch(tokens=torch.zeros(1, 16), sample_ids=torch.arange(1)))
        forward = notes[:]
        del notes[:]
        y.sum().backward()
    forward, backward = ([note for note, _ in itertools.groupby(found)] for found in (forward, notes))
    return forward, backward


def test_keys_travel_while_queries_are_computed():
    """Forward projects queries meanwhile, and backward, where keys travel again, the output projection's gradients."""
    forward, backward = noted()
    assert forward == ["product", "gather 0", "product", "wait for gather 0", "attention", "product"]
    assert backward == [
        *("gather 0", "product", "wait for gather 0", "attention"),
        *("sum 0", "wait for sum 0", "product"),
    ]  # fmt: skip


def test_heads_travel_while_attention_runs_on_those_before(monkeypatch):
    """Forward sends the next group of heads before it attends to one. Backward begins with the last group, and so do
    the sums of gradients, each of which has the attention of the next group's backward to itself."""
    monkeypatch.setattr(context, "LEAST_BYTES", 1)
    forward, backward = noted(model__kv_heads=4)
    assert forward == [
        *("product", "gather 0", "product"),
        *("wait for gather 0", "gather 1", "attention"),
        *("wait for gather 1", "gather 2", "attention"),
        *("wait for gather 2", "gather 3", "attention"),
        *("wait for gather 3", "attention", "product"),
    ]
    assert backward == [
        *("gather 0", "product"),
        *("wait for gather 0", "gather 1", "attention", "sum 0"),
        *("wait for gather 1", "gather 2", "attention", "wait for sum 0", "sum 1"),
        *("wait for gather 2", "gather 3", "attention", "wait for sum 1", "sum 2"),
        *("wait for gather 3", "attention", "wait for sum 2", "sum 3"),
        *("wait for sum 3", "product"),
    ]


def gather_and_keep(rank: int, size: int) -> dict[str, object]:
    """The gradient of a function of gathered positions of two heads, and what is alive between forward and backward."""
    tp = TensorParallel(cp=Mesh.connect(Layout(cp=size), rank).cp)
    whole = every_position(size)
    mine = zigzag(4 * size, rank, size).of(whole.flatten(0, 2)).view(2, 1, 2, 4, 2).requires_grad_()
    gather, alive = Gather(tp), []

    def attend(number: int, groups: int, q: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        assert groups == 2 and torch.equal(both, whole[:, :, number : number + 1])
        alive.append(weakref.ref(both))
        first = both[:, :, :, : 4 * size - 1]
        return (first * first * (rank + 1)).sum() * q

    with mock.patch.object(context, "LEAST_BYTES", 1):
        y = gather.by_groups(attend, torch.ones(1, 2, 1, 1, dtype=torch.float64), mine).sum()
    kept = [one() is not None for one in alive]
    y.backward()
    return {"grad": mine.grad, "kept": any(kept), "number": len(kept)}


def every_position(size: int) -> torch.Tensor:
    return torch.arange(32.0 * size, dtype=torch.float64).view(2, 1, 2, 4 * size, 2)


def test_gradients_of_gathered_positions_are_summed_over_ranks_and_the_whole_is_not_kept():
    size = 2
    whole = every_position(size)
    expected = 2 * whole * sum(rank + 1 for rank in range(size))
    expected[:, :, :, -1] = 0
    for rank, found in enumerate(on_warm_world(size, gather_and_keep)):
        mine = zigzag(4 * size, rank, size).of(expected.flatten(0, 2)).view_as(found["grad"])
        assert torch.equal(found["grad"], mine) and not found["kept"] and found["number"] == 2
