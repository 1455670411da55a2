"""`roots verify` in bf16 gives all runs the same experts, and counts what they would have chosen otherwise."""

import torch

from roots_dist.config.schema import Config
from roots_dist.learning.models.experts import Experts
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.verify.choices import Chooser, Counted, choices_of
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Axis
from roots_dist.world.positions import zigzag
from roots_dist.world.sharding import initialize, parameters_of

SAMPLES, S, D, EXPERTS = (5, 9), 8, 16, 4


def made(**axes: Axis) -> tuple[Experts, torch.Tensor]:
    """A layer, and its input [2, S, D]."""
    config = Config.model_validate(
        {
            "model": dict(layers=1, hidden=D, heads=2, ffn=8, experts=EXPERTS, experts_per_token=2, mlp_bias=False),
            "advanced": {"float64": True},
        }
    )
    layer = Experts(config, TensorParallel(**axes), "blocks.0", init_stds(config)).double()
    initialize(parameters_of([("blocks.0.mlp", layer)]), 3)
    x = torch.randn(len(SAMPLES), S, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return layer, x.requires_grad_()


def batch(**fields: object) -> MicroBatch:
    return MicroBatch(
        tokens=torch.zeros(len(SAMPLES), S, dtype=torch.int64), sample_ids=torch.tensor(SAMPLES), **fields
    )


def noted():
    """What a layer gives, and the choices that were noted beside it."""
    layer, x = made()
    chooser = Chooser({})
    chooser.watch(layer)
    y = layer(x, batch(), [])
    return y.detach(), choices_of([chooser.found()])


def test_what_one_run_has_chosen_another_one_takes_and_counts():
    y, known = noted()
    assert {layer: sorted(samples) for layer, samples in known.items()} == {"blocks.0": [*SAMPLES]}
    first = known["blocks.0"][5]
    assert first.shape == (S, 2) and (first[:, 0] < first[:, 1]).all()
    others = [number for number in range(EXPERTS) if number not in first[0]]
    known["blocks.0"][5][0] = others
    layer, x = made()
    chooser = Chooser(known)
    chooser.watch(layer)
    z = layer(x, batch(), [])
    differs = ((z - y).abs() > 1e-9).any(-1)
    assert differs[0, 0] and differs.sum() == 1, "one token goes to other experts, and no other one changes"
    assert chooser.made == 2 * S * 2 and chooser.differing == 2 and not chooser.noted
    taken = torch.tensor([known["blocks.0"][sample].tolist() for sample in SAMPLES]).flatten()
    assert layer.take_load("report").tolist() == taken.bincount(minlength=EXPERTS).tolist(), "loads are of those taken"
    z.sum().backward()
    assert x.grad is not None and layer.router.weight.grad.abs().sum() > 0, "their weights are the router's own"


def test_evaluation_and_recomputation_are_left_alone():
    y, known = noted()
    for sample in SAMPLES:
        known["blocks.0"][sample][:] = [0, 1]
    layer, x = made()
    chooser = Chooser(known)
    chooser.watch(layer)
    kept = batch(chosen_experts={})
    first = layer(x, kept, [])
    assert torch.equal(layer(x, kept, []), first) and chooser.made == 2 * S * 2, "a choice is taken, and counted, once"
    assert torch.equal(layer.eval()(x, batch(), []), y)


def test_a_context_rank_takes_the_choices_of_its_positions():
    y, known = noted()
    for rank in range(2):
        layer, x = made(cp=Axis("cp", 2, rank, (0, 1), None))
        chooser = Chooser(known)
        chooser.watch(layer)
        held = zigzag(S, rank, 2)
        torch.testing.assert_close(layer(held.of(x), batch(), []), held.of(y), rtol=0, atol=1e-12)
        assert (chooser.made, chooser.differing) == (2 * S, 0)


def ranks(*differing: int) -> list[dict[str, int]]:
    return [{"made": 5000, "differing": number} for number in differing]


def test_a_layout_may_choose_as_differently_as_one_process():
    counted = Counted()
    assert not counted.row().passed, "on nothing"
    counted.add(ranks(12, 13), [{"made": 10_000, "differing": 20}])
    assert counted.row().passed and counted.row().largest == 25 / 10_000
    assert "of 10,000 choices bf16 would have made 25 otherwise in this layout, 20 in one process" in counted.note()
    counted.add(ranks(40, 40), [{"made": 10_000, "differing": 20}])
    assert not counted.row().passed, "a score that is wrong in the layout alone"
