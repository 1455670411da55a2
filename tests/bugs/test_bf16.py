"""What bf16's eight bits must not touch: factors that hold for a whole tensor."""

import torch
import torch.nn.functional as F

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.cross_entropy import linear_cross_entropy
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.train.step import count_targets, scales
from roots_dist.storage.checkpoint.load import load_initial_weights
from roots_dist.storage.checkpoint.save import save
from roots_dist.world import rng
from roots_dist.world.mesh import Mesh
from tests.parity.models import COMMON, MODELS


def test_dropout_scales_bf16_by_the_factor_and_not_by_its_bf16():
    """1 / 0.9 as bf16 is 1.1094: every activation was 0.16 % too small."""
    x = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16() + 1
    y = rng.dropout(x, 0.1, torch.arange(64))
    kept = y != 0
    assert torch.equal(y[kept], (x[kept].double() / 0.9).bfloat16())


def test_dropout_keeps_nothing_of_its_size_for_backward():
    saved = []
    x = torch.ones(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rng.dropout(x, 0.5, torch.arange(4))
    assert [t.shape for t in saved] == [(4,)]


def test_a_temperature_near_zero_is_greedy_and_no_overflow():
    logits = torch.tensor([[3.0, 900.0, 899.0]])
    for temperature in (1e-45, 1e-30, 1e-3):
        assert Sampling(temperature, top_k=2, top_p=0.9).choose(logits, torch.tensor([0.999])).tolist() == [1]


def test_the_loss_scale_is_not_rounded_to_bf16():
    """1/1001 as bf16 is 0.1 % off, and with it every gradient but the head's, by another factor in each step."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 16), (32, 16)))
    targets = torch.randint(32, (64,), generator=generator)

    def gradient(scale: float) -> torch.Tensor:
        x = hidden.clone().requires_grad_()
        (linear_cross_entropy(TensorParallel(), x, weight, targets, vocab=32)[0] * scale).backward()
        return x.grad

    assert torch.equal(gradient(1 / 1001), (gradient(1.0).double() / 1001).bfloat16())


def test_label_smoothing_is_not_rounded_to_float32_in_float64():
    """A float times a tensor of bools is float32: the gradient was off by 1e-9, which a proof at 1e-10 would have
    seen."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 5), (32, 5)))
    targets = torch.randint(32, (9,), generator=generator)

    def gradient(loss) -> torch.Tensor:
        hidden = x.clone().requires_grad_()
        loss(hidden).backward()
        return hidden.grad

    ours = gradient(lambda h: linear_cross_entropy(TensorParallel(), h, weight, targets, vocab=32, smoothing=0.1)[0])
    torchs = gradient(lambda h: F.cross_entropy(h @ weight.t(), targets, label_smoothing=0.1, reduction="sum"))
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)


def test_a_bf16_model_begins_with_the_weights_that_it_starts_from(tmp_path):
    """Not its float32 masters alone, which the model would see after the first step."""
    tree = {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 29},
        "data": {"seq_length": 8},
        "train": {"global_batch": 1, "precision": "bf16"},
    }
    first, second = (
        build_run(Config.model_validate(tree).changed({"train.seed": seed}), Mesh.single()) for seed in (0, 1)
    )
    load_initial_weights(
        save(tmp_path, 1, first.engine, first.params, first.mesh, {}), second.engine, second.params, second.mesh
    )
    for mine, given in zip(second.params, first.params, strict=True):
        assert mine.tensor.dtype == torch.bfloat16 and torch.equal(mine.tensor, given.tensor), mine.name


def test_many_microbatches_lose_nothing_of_a_gradient():
    """A sum of 64 gradients in bf16 had twice the error of one of them, and a layout of many microbatches with it."""
    base = Config.model_validate(COMMON | {"model": MODELS["llama"]}).changed(
        {"train.global_batch": 64, "advanced.float64": False, "model.dropout": 0.0, "model.layers": 2}
    )

    def gradients(weights=None, **changes):
        made = base.changed({key.replace("__", "."): value for key, value in changes.items()})
        run = build_run(made, Mesh.single(), objective=proof_objective(made))
        with torch.no_grad():
            for p in run.params if weights else ():
                p.tensor.copy_(weights[p.name])
        batches = random_batches(made, 0, 0, 1)
        run.passes.forward_backward(batches, scales(run, count_targets(run, batches)))
        return {p.name: p.tensor.grad.double() for p in run.params}, {p.name: p.tensor.detach() for p in run.params}

    def error(found):
        squares = sum((found[name] - truth[name]).square().sum() for name in truth)
        return float(squares / sum(gradient.square().sum() for gradient in truth.values())) ** 0.5

    _, weights = gradients(train__precision="bf16", train__micro_batch=64)
    truth, _ = gradients(weights, advanced__float64=True, train__micro_batch=64)
    one, many, rounded = (
        error(gradients(weights, train__precision="bf16", train__micro_batch=size, advanced__grad_dtype=dtype)[0])
        for size, dtype in ((64, "fp32"), (1, "fp32"), (1, "bf16"))
    )
    assert many < 1.1 * one and rounded > 1.3 * one
