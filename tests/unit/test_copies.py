"""Copies that differ are found and named, and healed from most ranks; in one process what a digest and a majority are.
tests/chaos/flips.py flips single bits of weights, moments and gradients in six layouts."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from chaos.hangs import write_run
from commands import roots

from roots_dist.assembly.run import Run, build_run
from roots_dist.cli.main import main
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.train import loop
from roots_dist.runs.train.copies import CopiesDiffer, check_copies, differences, digest, majority
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_changes_the_digest(dtype):
    tensor = torch.randn(3, 8199, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, bits = (
        digest(tensor),
        tensor.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]),
    )
    for place in (0, 8191, 8192, 24596):
        for bit in (0, 5, 8 * dtype.itemsize - 2):
            bits[place] ^= 1 << bit
            assert digest(tensor) != before
            bits[place] ^= 1 << bit
    assert digest(tensor) == before and digest(torch.cat([tensor[1:], tensor[:1]])) != before
    assert digest(torch.empty(0, dtype=dtype)) == 0


@pytest.mark.parametrize(
    "table, wrong, right",
    [
        ([(1, 7), (1, 7), (1, 8), (0, 0)], (2,), (0, 1)),
        ([(1, 7), (1, 8)], (0, 1), ()),
        ([(1, 7), (1, 7), (1, 7), (2, 5), (2, 6), (2, 5)], (4,), (0, 1, 2, 3, 5)),
        ([(1, 7), (2, 8), (1, 7), (2, 9)], (1, 3), ()),
    ],
)
def test_who_is_wrong_is_what_most_of_the_same_slice_say(table, wrong, right):
    assert majority(table) == (wrong, right)


def config_of(layout: Layout, differing: str, zero: int) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "vocab": 61}
            | ({"experts": 4, "mlp_bias": False} if layout.ep > 1 else {}),
            "data": {"seq_length": 8},
            "parallel": {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "zero_stage": zero}
            | ({"zero_ranks": layout.zero_ranks} if layout.zero_ranks else {}),
            "train": {"global_batch": 8, "device": "cpu"},
            "advanced": {"engine": "reference", "differing_copies": differing},
        }
    )


MORE = {
    "blocks.1.norm1.weight": (0, "exp_avg_sq"),  # of the rank that is right about exp_avg
    "blocks.0.norm1.weight": (1, "weight"),
    "blocks.0.norm2.weight": (3, "weight in use"),
    "blocks.1.norm2.weight": (2, "exp_avg"),
}
"""What else differs in the first case, where it is healed: name -> rank and kind."""
CASES = (
    (Layout(tp=4), 1, (2,), "blocks.1.norm1.weight", "exp_avg"),
    (Layout(tp=4), 1, (3,), "blocks.0.attention.key.weight", "weight"),  # of two slices, each on two ranks
    (Layout(tp=2, dp=2), 0, (1,), "blocks.0.norm2.weight", "exp_avg_sq"),
    (Layout(pp=2, dp=2), 0, (3,), "embed.tokens.weight", "weight"),  # tied
    (Layout(pp=2, dp=2), 0, (2, 3), "embed.tokens.weight", "exp_avg"),  # only the two stages differ
    (Layout(dp=4, ep=2), 0, (2,), "blocks.0.mlp.experts.0.up.weight", "weight"),  # of two copies, on ranks 0 and 2
    (Layout(dp=4, ep=2), 0, (3,), "blocks.0.mlp.router.weight", "exp_avg"),
    (Layout(dp=4, zero_ranks=2), 3, (2, 3), "blocks.0.norm2.weight", "exp_avg"),  # two groups hold the same shards
)
"""Layout, ZeRO stage, the ranks whose copy is another, and of what."""


def harm(run: Run, name: str, kind: str) -> None:
    """Change one number of what this rank holds."""
    if kind == "weight in use":
        next(p for p in run.params if p.name == name).tensor.data.view(-1)[-1] += 1
        return
    state = run.engine.read_state(name)
    state[kind].view(-1)[-1] += 1
    run.engine.write_state(name, state)


def harmed(rank: int, size: int) -> list[str]:
    said = []
    for layout, zero, victims, name, kind in CASES:
        for differing in ("stop", "heal"):
            run = build_run(config_of(layout, differing, zero), Mesh.connect(layout, rank))
            check_copies(run, 1)
            names = [p.name for p in run.params]
            before = {name: run.engine.read_state(name) for name in names}
            if rank in victims:
                assert name in names, names
                harm(run, name, kind)
            if layout == CASES[0][0] and victims == CASES[0][2] and differing == "heal":
                for other, (its, kind) in MORE.items():
                    if rank == its:
                        harm(run, other, kind)
            try:
                check_copies(run, 2)
                equal = not list(differences(run)) and all(
                    torch.equal(value, before[name][kind])
                    for name in names
                    for kind, value in run.engine.read_state(name).items()
                )
                said.append("equal" if equal else "still different")
            except CopiesDiffer as error:
                said.append(str(error))
    return said


def test_the_parameter_and_the_rank_are_named_or_healed():
    found = on_warm_world(4, harmed)
    assert all(said == found[0] for said in found)
    stops, heals = found[0][::2], found[0][1::2]
    for (_, _, (*_, victim), name, _), said in zip(CASES, stops):
        assert f" of {name} (" in said and "step 2: " in said
        assert f"on rank {victim} is not that of" in said or ("no majority" in said and str(victim) in said), said
    assert ["no majority" in said for said in stops] == [False, True, False, False, True, True, False, True]
    assert [said == "equal" for said in heals] == [True, False, True, True, False, False, True, False]


def drifting(words: list[str]) -> None:
    """`roots WORDS`, on a rank 1 whose memory changes a norm after step 4."""
    inside = loop.train_step

    def step(run, batches, *more):
        report = inside(run, batches, *more)
        if batches[0].step == 3 and run.mesh.rank == 1:
            next(p for p in run.params if p.name == "blocks.0.norm1.weight").tensor.data[0] += 1e-3
        return report

    with mock.patch.object(loop, "train_step", step):
        main(words)


def test_what_differs_is_never_saved(tmp_path):
    ran = roots("train", str(write_run(tmp_path, 60)), "parallel.tp=2", "checkpoint.every=2", ranks=2, main=drifting)
    assert ran.returncode == 2, ran.stderr
    (said,) = (line for line in ran.stderr.splitlines() if line.startswith("✗"))
    assert said.startswith("✗ step 4: the copies of blocks.0.norm1.weight (weight in use) on ranks 0-1 differ"), said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert (tmp_path / "run" / "ended.txt").read_text().startswith("failed: rank ")
