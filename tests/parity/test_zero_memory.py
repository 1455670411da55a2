"""What a data rank holds, at its start too, falls with the number of data ranks as theory says (Rajbhandari et al.
2020, figure 1)."""

import itertools

import pytest
import torch

from roots_dist.assembly.rank_model import build_model
from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.zero.unit import Weights
from roots_dist.runs.plan.cost_counter import CostCounter
from roots_dist.runs.plan.rank_cost import fake_mesh
from roots_dist.runs.train.step import train_step
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.world.mesh import Mesh


def config(stage: int, dp: int) -> Config:
    """Eighteen pieces, of which none is large, two microbatches, and few activations."""
    return Config.model_validate(
        {
            "model": {"layers": 16, "hidden": 64, "heads": 2, "vocab": 256, "tied_embeddings": False},
            "data": {"seq_length": 8},
            "train": {"global_batch": 2 * dp},
            "parallel": {"zero_stage": stage},
        }
    )


def held(rank: int, size: int, stage: int) -> dict[str, float]:
    """Bytes of tensors for each parameter of the model: between two steps, and at most within one."""
    mesh, made = Mesh.connect(Layout(dp=size), rank), config(stage, size)
    with CostCounter() as counter:
        run = build_run(made, mesh, objective=proof_objective(made))
        for step in range(2):
            batches = random_batches(made, step, mesh.dp.rank, mesh.dp.size)
            between = counter.live
            counter.restart_peak()
            train_step(run, batches, 1e-3)
    parameters = sum(p.tensor.numel() for p in run.params)
    return {"between": between / parameters, "peak": counter.peak / parameters}


class Held(CostCounter):
    """Counts what has memory: shapes of the whole model are made at every start."""

    def _add(self, tensors: list[torch.Tensor]) -> None:
        super()._add([tensor for tensor in tensors if not tensor.is_meta])


@pytest.mark.parametrize("dp", [4, 8])
def test_a_rank_starts_with_what_it_keeps(dp):
    """Under ZeRO-3 a start never holds the weights of a whole model: they are drawn piece by piece, and are those of
    one process to the bit. Then come the moments. A block is a seventh of this model; its weights are drawn, and put
    end to end, which takes them twice, and drawing them a bit more."""
    made, layout = config(3, dp).changed({"model.layers": 6, "model.hidden": 32}), Layout(dp=dp)
    with Held() as counter:
        run = build_run(made, fake_mesh(layout, 0, None, torch.device("cpu")), objective=proof_objective(made))
    weights = sum(p.tensor.numel() * 4 for p in run.params)
    counted = f"{counter.peak / weights:.2f} of the weights at most, {counter.live / weights:.2f} then"
    assert counter.live / weights == pytest.approx(3 / dp, rel=0.03), counted
    assert counter.peak <= max(counter.live, (1 / dp + 2.5 / 6) * weights), counted
    whole = {p.name: p.tensor for p in build_model(made, Mesh.single()).params}
    for unit in run.engine.units:
        expected = unit.flat.joined([whole[p.name].detach() for p in unit.flat.params], torch.float32)
        assert torch.equal(unit.weights.part, expected[unit.flat.mine])


def gathers(rank: int, size: int) -> tuple[int, int, list[tuple[str, int]]]:
    """The number of pieces and of microbatches, and of one step under ZeRO-3 what happens to the weights of which
    piece: they are gathered, or waited for."""
    made = config(3, size).changed({"model.layers": 3})
    run = build_run(made, Mesh.connect(Layout(dp=size), rank), objective=proof_objective(made))
    events: list[tuple[str, int]] = []

    def note(number: int, weights: Weights) -> None:
        start, wait = weights.start_gather, weights.wait
        weights.start_gather = lambda: start() or events.append(("gather", number))
        weights.wait = lambda: (events.append(("wait", number)) if weights._arriving else None) or wait()

    for number, unit in enumerate(run.engine.units):
        note(number, unit.weights)
    batches = random_batches(made, 0, run.mesh.dp.rank, size)
    train_step(run, batches, 1e-3)
    return len(run.engine.units), len(batches), events


def test_a_piece_is_gathered_once_for_each_pass_over_it_while_another_computes():
    """Where a backward pass follows on a forward one, or a forward one on a backward one, the piece at the end is
    still there."""
    for pieces, microbatches, events in on_warm_world(2, gathers):
        assert (pieces, microbatches) == (5, 2)
        gathered = [number for what, number in events if what == "gather"]
        assert len(gathered) == 1 + 2 * microbatches * (pieces - 1)
        for before, (what, number) in itertools.pairwise(events):
            assert what == "gather" or before != ("gather", number), "it is waited for at once"


@pytest.mark.full
@pytest.mark.parametrize("dp", [2, 4, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_falls_with_data_ranks(stage, dp):
    """Weights in float32, their own master copies, take 4 bytes a parameter, moments 8, gradients 4. What comes on top
    in a step, activations and the pieces whose whole weights and gradients exist at a time, does not grow."""
    weights, gradients = 4 / (dp if stage == 3 else 1), 4 / (dp if stage >= 2 else 1)
    for found in on_world(dp, held, stage, timeout=600):
        assert found["between"] == pytest.approx(weights + 8 / dp, rel=0.02)
        assert found["peak"] - found["between"] - gradients < 2.2
