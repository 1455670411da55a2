"""What a bf16 model computes more exactly nevertheless: losses, angles, norms. Against float64 of the same inputs.

bf16 has eight bits: a sum of a thousand terms or a position above 256 is wrong in it, alike in every layout. Bounds are
those of float32, or of one rounding to bf16 at the end. Masters and moments are in tests/conformance.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.learning.models.heads import class_term
from roots_dist.learning.models.positions import Alibi
from roots_dist.learning.models.rotary import Rotary
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.parallel.optim.norm import group_norms
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.cross_entropy import linear_cross_entropy, logits, target_scores
from roots_dist.world.mesh import SINGLE, Mesh
from roots_dist.world.positions import Positions
from roots_dist.world.sharding import Param, ShardSpec

ONE_ROUNDING = 2.0**-8
"""Largest relative error of rounding to bf16."""
TOKENS, WIDTH, VOCAB = 200, 16, 500


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden and weight in bf16, and targets."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=draw).bfloat16() for shape in ((TOKENS, WIDTH), (VOCAB, WIDTH)))
    return hidden, weight, torch.randint(VOCAB, (TOKENS,), generator=draw)


def test_the_loss_over_the_vocabulary_is_summed_in_float32():
    """Logits are products in bf16; from them on nothing is rounded but the gradients, once."""
    hidden, weight, targets = inputs()
    scores = F.linear(hidden, weight)
    exact = scores.double().requires_grad_()
    log_z, smoothing, z_loss = exact.logsumexp(1), 0.1, 0.01
    chosen = exact.gather(1, targets.unsqueeze(1)).squeeze(1)
    expected = (log_z - (1 - smoothing) * chosen - smoothing * exact.mean(1) + z_loss * log_z.square()).sum()
    hidden.requires_grad_()
    weight.requires_grad_()
    found, _ = linear_cross_entropy(
        TensorParallel(), hidden, weight, targets, vocab=VOCAB, smoothing=smoothing, z_loss=z_loss, chunk=4
    )
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    (grad,) = torch.autograd.grad(expected, exact)
    for ours, wanted in ((hidden.grad, grad @ weight.double()), (weight.grad, grad.t() @ hidden.double())):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - wanted).norm() / wanted.norm()
        assert error < ONE_ROUNDING, error  # logits' gradients and each chunk's product are rounded, their sum is not
    score, _ = target_scores(TensorParallel(), hidden, weight, targets, vocab=VOCAB, chunk=64)
    torch.testing.assert_close(score.double(), (chosen - log_z).detach(), rtol=1e-5, atol=1e-5)
    assert logits(TensorParallel(), hidden, weight, VOCAB).dtype == torch.float32


def test_classes_are_scored_in_float32():
    scores = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(500) % 3
    expected = F.cross_entropy(scores.double(), labels, reduction="sum", label_smoothing=0.1)
    found = class_term("tag", scores, labels, 0.1).sum
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_replaced_tokens_are_scored_in_float32():
    model = dict(family="electra", layers=1, hidden=16, heads=2, vocab=61, norm_position="post", init_std=0.5)
    config = Config.model_validate(
        {"model": model, "objective": {"name": "rtd"}, "data": {"seq_length": 64}, "train": {"precision": "bf16"}}
    )
    (stage,) = build_model(config, Mesh.single()).stages.values()
    (batch, *_) = random_batches(config, 0, 0, 1)
    said: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    head = stage.pieces[-1]
    head.score.register_forward_hook(lambda _, args, out: said.append(out))
    head.register_forward_pre_hook(lambda _, args: read.append(args[0]["tokens"]))
    with torch.no_grad():
        _, rtd = stage({}, batch).results
    scored = batch.originals >= 0
    assert said[0].dtype == torch.bfloat16
    expected = F.binary_cross_entropy_with_logits(
        said[0].squeeze(-1).double()[scored], (read[0] != batch.originals)[scored].double(), reduction="sum"
    )
    assert rtd.sum.dtype == torch.float32 and rtd.sum.item() == pytest.approx(expected.item(), rel=1e-6)


def test_angles_and_distances_are_taken_in_float32():
    """Positions above 256 are not in bf16: their angles would be off by radians."""
    where = range(3000, 3020)
    x = torch.randn(1, 2, 20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, wanted = (Rotary(64, 10000.0)(t, Positions((where,))).double() for t in (x, x.double()))
    assert (found - wanted).abs().max() < 4 * ONE_ROUNDING * wanted.abs().max()
    like = torch.zeros((), dtype=torch.bfloat16)
    found, wanted = (Alibi(12, slice(0, 12)).bias(where, 3020, t).double() for t in (like, like.double()))
    visible = wanted.isfinite()
    assert torch.equal(visible, found.isfinite())
    torch.testing.assert_close(found[visible], wanted[visible], rtol=ONE_ROUNDING, atol=0)


def test_sinusoids_are_taken_in_float32():
    """Learned or not, their angles are those of the place, whatever the model's dtype."""
    model = dict(layers=1, hidden=32, heads=2, vocab=61, positions="sinusoidal", init_std=1e-6)
    hidden = {}
    for precision in ("bf16", "fp32"):
        config = Config.model_validate(
            {"model": model, "data": {"seq_length": 2000}, "train": {"precision": precision}}
        )
        (stage,) = build_model(config, Mesh.single()).stages.values()
        (batch, *_) = random_batches(config, 0, 0, 1)
        with torch.no_grad():
            hidden[precision] = stage.pieces[0]({}, batch)["hidden"].double()
    assert (hidden["bf16"] - hidden["fp32"]).abs().max() < ONE_ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_of_large_gradients_are_those_of_float64(dtype):
    """torch sums a tensor's squares in float32 one after the other on CPU: of a million the norm was 1e-5 off, of
    thirty million 2e-3, and by how much depended on the slices that ranks hold."""
    sizes = (50_000, 7, 1_000_000)
    gradients = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in sizes]
    params = [Param(str(n), torch.nn.Parameter(g), ShardSpec(shape=g.shape), SINGLE) for n, g in enumerate(gradients)]
    for chosen in ([0], [1], [2], [0, 1, 2]):
        (norm,) = group_norms([[(params[i], gradients[i]) for i in chosen]], [], torch.device("cpu"))
        expected = torch.cat([gradients[i].double() for i in chosen]).square().sum().sqrt()
        assert norm == pytest.approx(expected.item(), rel=1e-12)
