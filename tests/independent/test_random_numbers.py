"""Random numbers against what they claim: known answers of the hashes, rates and moments of the draws, and masks of two
keys that agree no more often than independent draws do.

Both sides of a proof draw from the same keys, so a key that forgets the layer or the step is the same mistake on both.
Bounds are five standard deviations; seeds are fixed, so that a test that passes once passes always.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.learning.models.norms import mask_rows
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh
from roots_dist.world.positions import Positions

CPU = torch.device("cpu")
WIDE = 1 << 17


def near(found: float, expected: float, sigma: float) -> bool:
    return abs(found - expected) <= 5 * sigma


def independent(a: Tensor, b: Tensor, drop: float) -> bool:
    """Two masks agree as often as two independent ones with this rate."""
    agree = drop**2 + (1 - drop) ** 2
    return near(float((a == b).double().mean()), agree, math.sqrt(agree * (1 - agree) / a.numel()))


# ── the generator ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_folded_by_splitmix64():
    """Its first numbers from the seed 1234567, as published with the algorithm (Vigna's splitmix64.c)."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [n % 2**64 for n in rng.fold(1234567, torch.arange(1, 6)).tolist()] == known


def test_bits_are_two_rounds_of_lowbias32_in_plain_integers():
    """Shifts of int32 are arithmetic and products wrap: here they are done on Python's integers."""

    def lowbias32(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    rows = rng.fold(3, torch.arange(20))
    columns = torch.tensor([0, 1, 2, 31, 2**16, 2**31 - 1], dtype=torch.int32)
    expected = [
        [lowbias32((lowbias32(row % 2**32 ^ c) + (row % 2**64 >> 32)) % 2**32) for c in columns.tolist()]
        for row in rows.tolist()
    ]
    assert [[n % 2**32 for n in row] for row in rng.bits(rows, columns).tolist()] == expected


def test_a_mask_keeps_what_is_at_least_its_limit():
    """Limits are single numbers that were drawn, the largest, and the least: their lower halves matter."""
    rows, columns = rng.fold(3, torch.arange(8)), torch.arange(500, dtype=torch.int32)
    drawn = rng.bits(rows, columns)
    for limit in (*drawn[:, ::60].flatten().tolist(), -(2**31), 2**31 - 1):
        for near_by in (max(limit - 1, -(2**31)), limit):
            drop = (near_by + 2**31) / 2**32
            assert rng.limit_of(drop) == near_by
            assert torch.equal(rng.keep(rows, columns, drop), drawn >= near_by)


def test_names_and_numbers_of_a_key_do_not_run_together():
    keys = [("a", 1), ("a1",), ("a", "1"), ("a", 11), ("a", 1, 1), (1, "a"), ("a", "1", 1)]
    assert len({rng.key(*parts) for parts in keys}) == len(keys)


def test_every_bit_and_every_byte_is_even():
    drawn = rng.bits(rng.fold(5, torch.arange(64)), torch.arange(4096, dtype=torch.int32)).flatten()
    n = drawn.numel()
    for bit in range(32):
        assert near(float(((drawn >> bit) & 1).double().mean()), 0.5, 0.5 / math.sqrt(n)), bit
    for byte in range(4):
        counts = torch.bincount((drawn >> 8 * byte) & 255, minlength=256).double()
        chi = ((counts - n / 256).square() / (n / 256)).sum()
        assert near(float(chi), 255, math.sqrt(2 * 255)), byte


@pytest.mark.parametrize("drop", [1e-3, 0.1, 0.5, 0.9])
def test_masks_drop_as_often_as_they_say_and_scale_the_rest(drop):
    x = torch.rand(8, WIDE, dtype=torch.float64) + 1
    x.requires_grad_()
    y = rng.dropout(x, drop, rng.fold(1, torch.arange(8)))
    kept = y != 0
    assert near(float((~kept).double().mean()), drop, math.sqrt(drop * (1 - drop) / x.numel()))
    torch.testing.assert_close(y, x / (1 - drop) * kept, rtol=1e-15, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept.double() / (1 - drop), rtol=1e-15, atol=0)


def test_a_kernel_has_what_it_can_compute_in_float32(monkeypatch):
    rows, x = rng.fold(1, torch.arange(8)), torch.ones(8, 4)
    kernels = SimpleNamespace(dropout=lambda x, *others: x + 1)
    monkeypatch.setattr(rng, "kernels_of", lambda device: kernels)
    assert torch.equal(rng.dropout(x, 0.5, rows), x + 1)
    assert torch.equal(rng.dropout(x.bfloat16(), 0.5, rows), x.bfloat16() + 1)
    assert set(rng.dropout(x.double(), 0.5, rows).flatten().tolist()) == {0.0, 2.0}


def mask(drop: float = 0.3, seed=7, step=3, site="blocks.0.1", sample=5, position=9, head=None, first=0) -> Tensor:
    """WIDE channels of one row of a mask. head: of attention probabilities."""
    batch = MicroBatch(tokens=torch.zeros(1, 1), sample_ids=torch.tensor([sample]), step=step)
    rows = mask_rows(seed, site, batch, Positions((range(position, position + 1),)), CPU)
    rows = rows if head is None else rng.fold(rows, torch.tensor(head))
    return rng.dropout(torch.ones(1, 1, WIDE), drop, rows, first)[0, 0] != 0


CHANGES = [
    *({"seed": n} for n in (6, 8, 7 + 2**31)),
    *({"step": n} for n in (0, 2, 4, 9, 10**6)),
    *({"site": name} for name in ("blocks.1.1", "blocks.0.2", "blocks.10.1", "embed", "blocks.0.cross")),
    *({"sample": n} for n in (4, 6, 9, 5 + 2**32, 10**12)),
    *({"position": n} for n in (0, 8, 10, 5, 4096)),
    {"sample": 9, "position": 5},
    *({"head": n} for n in (0, 1, 9)),
    *({"first": n} for n in (1, 2, 16, 64, WIDE)),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_masks_whose_keys_differ_in_one_coordinate_are_independent(change):
    assert torch.equal(mask(), mask()) and independent(mask(), mask(**change), 0.3)


def test_masks_of_heads_are_independent():
    for a, b in itertools.combinations([mask(head=n) for n in (0, 1, 2, 3)], 2):
        assert independent(a, b, 0.3)


# ── the sites of whole models ────────────────────────────────────────────────────────────────────────────────────────

BERT = dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu", segments=2)
MODELS = {
    "clm": dict(),
    "mlm-nsp": BERT,
    "rtd": BERT | dict(family="electra"),
    "spans": dict(family="t5", positions="relative", norm="rmsnorm", activation="relu", bias=False),
    "classify": BERT | dict(family="electra"),
}


def model_and_batches(objective: str, drop: float):
    sizes = dict(layers=2, hidden=64, heads=4, vocab=61, ffn=64, dropout=drop, attention_dropout=drop)
    config = Config.model_validate(
        {
            "model": sizes | MODELS[objective],
            "objective": {"name": objective},
            "finetune": {"labels": ["a", "b"]} if objective == "classify" else {},
            "data": {"seq_length": 16},
            "train": {"global_batch": 2, "micro_batch": 2},
        }
    )
    model = build_model(config, Mesh.single())
    (stage,) = model.stages.values()
    return model, stage, [random_batches(config, step, 0, 1)[0] for step in range(2)]


def recorded(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """(row keys, mask) of each call of dropout, from now on."""
    calls: list[tuple[Tensor, Tensor]] = []
    dropout, mask = rng.dropout, rng.mask

    def record(x: Tensor, drop: float, rows: Tensor, first_column: int = 0, **how: object) -> Tensor:
        calls.append((rows, dropout(torch.ones_like(x), drop, rows, first_column) != 0))
        return dropout(x, drop, rows, first_column, **how)

    def record_mask(rows: Tensor, drop: float, columns: int) -> Tensor:
        calls.append((rows, mask(rows, drop, columns)))
        return mask(rows, drop, columns)

    monkeypatch.setattr(rng, "dropout", record)
    monkeypatch.setattr(rng, "mask", record_mask)
    return calls


@pytest.mark.parametrize("objective", MODELS)
def test_no_two_masks_of_a_model_are_alike(objective, monkeypatch):
    """Masks of all sites, layers, heads, samples and positions, and of two steps: each row has its own key, and masks
    of one shape agree no more often than by chance."""
    drop = 0.25
    _, stage, batches = model_and_batches(objective, drop)
    calls = recorded(monkeypatch)
    with torch.no_grad():
        for batch in batches:
            stage({}, batch)
    assert len(calls) >= 2 * 6
    keys = torch.cat([rows.flatten() for rows, _ in calls])
    assert keys.unique().numel() == keys.numel()
    for (_, a), (_, b) in itertools.combinations(calls, 2):
        if a.shape == b.shape:
            assert independent(a, b, drop)
    for _, found in calls:
        dropped = (~found).double()
        assert near(float(dropped.mean()), drop, math.sqrt(drop * (1 - drop) / found.numel()))


@pytest.mark.parametrize("objective", MODELS)
def test_evaluation_drops_nothing(objective, monkeypatch):
    model, stage, batches = model_and_batches(objective, 0.25)
    calls = recorded(monkeypatch)
    model.module.eval()
    with torch.no_grad():
        stage({}, batches[0])
    assert not calls


def test_the_generator_draws_anew_for_each_step_sample_and_position():
    """With equal logits each of 61 words comes as often as the others, and two draws agree once in 61 times."""
    _, stage, _ = model_and_batches("rtd", 0.0)
    head = stage.pieces[stage.names.index("generator.head")]
    with torch.no_grad():
        head.weight.zero_()
    size, seq = 64, 64

    def drawn(step: int, first_sample: int) -> Tensor:
        tokens = torch.zeros(size, seq, dtype=torch.int64)
        samples = torch.arange(first_sample, first_sample + size)
        batch = MicroBatch(tokens=tokens, targets=tokens, sample_ids=samples, step=step)
        return head._sample_replacements(torch.zeros(size, seq, 64), batch)

    one = drawn(0, 0)
    n, share = one.numel(), 1 / 61
    counts = torch.bincount(one.flatten(), minlength=61).double()
    assert len(counts) == 61
    chi = ((counts - n * share).square() / (n * share)).sum()
    assert near(float(chi), 60, math.sqrt(120))
    others = (drawn(1, 0), drawn(0, size), one.roll(1, 0), one.roll(1, 1))
    for other in others:
        assert near(float((one == other).double().mean()), share, math.sqrt(share / n))
    assert torch.equal(one, drawn(0, 0))


# ── normal numbers ───────────────────────────────────────────────────────────────────────────────────────────────────

ROWS, COLUMNS = 512, 1024


def normal(name: str, rows: range = range(ROWS), columns: range = range(COLUMNS), seed: int = 0) -> Tensor:
    return rng.normal_(torch.empty(len(rows), len(columns)), rng.key("init", seed, name), rows, columns, 1.0).double()


def test_normal_draws_are_normal():
    """Moments, the tails, and the largest distance between the two distribution functions (Kolmogorov and Smirnov:
    above 1.95/√n once in a thousand times)."""
    x = normal("blocks.0.mlp.up.weight").flatten()
    n = x.numel()
    moments = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0)}  # expected, variance of one draw
    for power, (expected, variance) in moments.items():
        assert near(float(x.pow(power).mean()), expected, math.sqrt(variance / n)), power
    for far in (2.0, 3.0, 4.0):
        for tail in (x > far, x < -far):
            share = 0.5 * math.erfc(far / math.sqrt(2))
            assert near(float(tail.double().mean()), share, math.sqrt(share / n)), far
    ordered = torch.special.ndtr(x.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((ordered - steps[:-1]).max()), float((steps[1:] - ordered).max()))
    assert distance < 1.95 / math.sqrt(n)


def test_normal_draws_are_box_and_muller_s():
    """√(-2 ln u) cos 2πv of two uniform numbers, taken from the bits of two keys in plain Python's floats."""
    rows, columns = range(5, 9), range(3, 8)
    found = normal("a", rows, columns)
    wide = torch.tensor(list(columns), dtype=torch.int32)
    for row, numbers in zip(rows, found.tolist()):
        keys = rng.fold(rng.fold(rng.key("init", 0, "a"), torch.tensor(row)), torch.arange(2))
        u, v = ((rng.bits(key, wide).double() + 2**31) / 2**32 for key in keys)
        expected = [math.sqrt(-2 * math.log(a)) * math.cos(2 * math.pi * b) for a, b in zip(u.tolist(), v.tolist())]
        assert numbers == pytest.approx(expected, abs=2e-6)


def test_normal_draws_of_two_names_seeds_rows_and_columns_do_not_correlate():
    """Neither the numbers nor their sizes (radius and angle are drawn apart)."""
    x = normal("a")
    others = [normal("b"), normal("a", seed=1), x.roll(1, 0), x.roll(1, 1), x.roll(256, 0), x.roll(512, 1), x.flip(1)]
    for i, other in enumerate(others):
        for a, b in ((x, other), (x.square() - 1, other.square() - 1)):
            r = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
            assert near(r, 0, 1 / math.sqrt(x.numel() / 2)), i  # half: a flip pairs each number twice


def test_a_slice_holds_the_numbers_of_the_whole():
    x = normal("a")
    assert torch.equal(normal("a", range(100, 140), range(3, 50)), x[100:140, 3:50])
