"""A bit that one rank computes otherwise is found by its neighbour, and named (train.recheck_every)."""

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
from roots_dist.learning.models.experts import OF_STEP, Experts
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train import loop
from roots_dist.runs.train.recheck import MicrobatchDiffers, compare
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh

CASES = (
    (Layout(dp=4), 3, 2, "forward", "data rank 2 (rank 2) computes other bits than its neighbours", "head.norm."),
    (Layout(dp=4), 1, 3, "backward", "data rank 3 (rank 3) computes other bits than", "blocks.0.mlp.down."),
    (Layout(dp=2, tp=2), 2, 1, "backward", "data ranks 0-1 (ranks 0-3) compute other bits", "blocks.0.mlp.down."),
    (Layout(dp=2, pp=2), 0, 3, "forward", "data ranks 0-1 (ranks 0-3) compute other bits", "head.norm."),
)
"""Layout, ZeRO stage, the rank whose arithmetic flips a bit, in which pass, who is said to, and in what first."""


def config_of(layout: Layout, zero: int) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 16, "heads": 4, "vocab": 61, "dropout": 0.1},
            "data": {"seq_length": 8},
            "parallel": {"tp": layout.tp, "pp": layout.pp, "zero_stage": zero},
            "train": {"global_batch": 8, "device": "cpu", "exact": {"tensor": 2, "data": 4}},
        }
    )


def flip(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, but for one bit of one. The last bit could be rounded away before it reaches a gradient, which
    depends on the processor."""
    changed = tensor.clone()
    changed.view(-1).view(torch.int32)[3] ^= 1 << 12
    return changed


def flip_in(run: Run, kind: str) -> None:
    """Let the first block of this rank compute one bit otherwise, forward or backward."""

    def hook(module, args, output):
        if kind == "forward":
            return {**output, "hidden": flip(output["hidden"])}
        output["hidden"].register_hook(flip)
        return None

    block = next(piece for name, piece in run.passes.model.pieces() if name.startswith("blocks."))
    block.register_forward_hook(hook)


def flipped(rank: int, size: int) -> list[str]:
    said = []
    for layout, zero, victim, kind, *_ in CASES:
        config = config_of(layout, zero)
        run = build_run(config, Mesh.connect(layout, rank), objective=proof_objective(config))
        dp = run.mesh.dp
        mine, theirs = (random_batches(config, 0, (dp.rank - before) % dp.size, dp.size)[:1] for before in (0, 1))
        compare(run, 1, mine, theirs)
        if rank == victim:
            flip_in(run, kind)
        try:
            compare(run, 2, mine, theirs)
            said.append("equal")
        except MicrobatchDiffers as error:
            said.append(str(error))
    return said


def test_a_bit_of_one_ranks_arithmetic_is_named():
    found = on_warm_world(4, flipped)
    assert all(said == found[0] for said in found)
    for (*_, who, first), said in zip(CASES, found[0]):
        assert said.startswith(f"step 2: {who}") and f"first in the gradient of {first}" in said, said


def test_tokens_that_are_computed_again_are_not_counted():
    """They would move the biases of routers, in some layouts."""
    config = config_of(Layout(), 0).changed({"model.experts": 4, "model.mlp_bias": False, "model.router_bias": True})
    run = build_run(config, Mesh.single(), objective=proof_objective(config))
    batches = random_batches(config, 0, 0, 1)
    layers = [module for module in run.passes.model.module.modules() if isinstance(module, Experts)]
    layers[1].loads = {OF_STEP: torch.arange(4)}
    compare(run, 1, batches, batches)
    assert not layers[0].loads and layers[1].loads[OF_STEP].tolist() == [0, 1, 2, 3]


def wearing_out(words: list[str]) -> None:
    """`roots WORDS`, on a rank 1 that computes one bit otherwise from step 4 on."""
    inside = loop.train_step

    def step(run, batches, *more):
        if batches[0].step == 3 and run.mesh.rank == 1:
            flip_in(run, "forward")
        return inside(run, batches, *more)

    with mock.patch.object(loop, "train_step", step):
        main(words)


@pytest.mark.full
def test_a_run_goes_on_while_ranks_compute_alike_and_stops_when_one_does_not(tmp_path):
    words = ["train", str(write_run(tmp_path, 60)), "train.exact={tensor: 1, data: 2}", "train.recheck_every=2"]
    ran = roots(*words, "train.steps=6", ranks=2)
    assert ran.returncode == 0, ran.stderr
    ran = roots(*words, "train.steps=6", f"track.folder={tmp_path}/other", ranks=2, main=wearing_out)
    assert ran.returncode == 2 and "step 4: data ranks 0-1 (ranks 0-1) compute other bits" in ran.stderr, ran.stderr
