"""LoRA as Hu et al. 2021 define it (section 4.1): h = W x + α/r · B A x, with W frozen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.learning.models.lora import merge_adapter
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh

IN, OUT, RANK, SCALE = 10, 6, 3, 0.7
EXACT = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_adds_its_product_and_learns_alone(kind, bias):
    layer = kind(TensorParallel(), IN, OUT, bias=bias, std=1.0)
    layer.adapt(RANK, SCALE)
    layer = layer.double()
    draw = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, generator=draw)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 5, IN, generator=draw, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora.a.weight, layer.lora.b.weight
    assert (a.shape, b.shape) == ((RANK, IN), (OUT, RANK))
    expected = F.linear(x, layer.weight, layer.bias) + SCALE * (x @ a.t() @ b.t())
    found = layer(x)
    torch.testing.assert_close(found, expected, **EXACT)
    weighed = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    leaves = [x, a, b, *([layer.bias] if bias else [])]
    grads, wanted = (torch.autograd.grad((y * weighed).sum(), leaves) for y in (found, expected))
    torch.testing.assert_close(grads, wanted, **EXACT)
    merged = merge_adapter(layer.weight, a, b, SCALE * RANK)
    torch.testing.assert_close(F.linear(x, merged, layer.bias), expected, **EXACT)


def test_a_model_with_adapters_is_the_plain_one_with_other_weights():
    """Adapters of every linear layer of a block, each scaled by alpha / rank. At first it is the plain model itself."""
    targets = ["query", "key", "value", "out", "gate", "up", "down"]
    tree = {
        "model": dict(layers=2, hidden=16, heads=2, vocab=61, init_std=0.3, activation="swiglu", norm="rmsnorm"),
        "data": {"seq_length": 8},
        "objective": {"name": "instruct"},
        "advanced": {"float64": True},
    }
    lora = {"strategy": "lora", "lora_rank": 4, "lora_alpha": 10.0, "lora_targets": targets}
    plain = build_model(Config.model_validate(tree), Mesh.single())
    ours = build_model(Config.model_validate(tree | {"finetune": lora}), Mesh.single())
    tokens = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens=tokens, targets=tokens.roll(-1, 1), sample_ids=torch.arange(2))

    def loss(model) -> torch.Tensor:
        (stage,) = model.stages.values()
        (term,) = stage({}, batch).results
        return term.sum

    weights = {p.name: p.tensor for p in ours.params}
    torch.testing.assert_close(loss(ours), loss(plain), **EXACT)
    adapted = [name.removesuffix(".lora.a.weight") for name in weights if name.endswith(".lora.a.weight")]
    assert len(adapted) == 2 * len(targets)
    with torch.no_grad():
        originals = {p.name: p.tensor for p in plain.params}
        for name in adapted:
            b = weights[f"{name}.lora.b.weight"]
            b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(len(name)), dtype=b.dtype))
            originals[f"{name}.weight"] += 10.0 / 4 * b @ weights[f"{name}.lora.a.weight"]
    assert abs(float(loss(ours).detach()) - float(loss(plain).detach())) < 1e-10
    torch.testing.assert_close(loss(ours), loss(plain), rtol=1e-11, atol=1e-11)
