"""Linear layers in one process, with adapters, an activation that is recomputed and put-off weight gradients, are
plain torch."""

import pytest
import torch
import torch.nn.functional as F

from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from roots_dist.world.sharding import set_grad

ROWS, SEQ, WIDTH, FEATURES, RANK, SCALE = 2, 5, 6, 8, 3, 0.7


def filled(layer):
    """With an adapter, and random numbers in all of its parameters."""
    layer.adapt(RANK, SCALE)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def plain(layer, x):
    """What the layer says, in torch's words."""
    a, b = layer.lora.a.weight, layer.lora.b.weight
    return F.linear(x, layer.weight, layer.bias) + SCALE * F.linear(F.linear(x, a), b)


def gradients(outputs, inputs, layers, tp=None):
    """Gradients of a weighted sum of the outputs, twice: as two microbatches that add up."""
    torch.manual_seed(1)
    wanted = [*inputs, *(p for layer in layers for p in layer.parameters())]
    for tensor in wanted:
        tensor.grad = None
    for _ in range(2):
        sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs()).backward()
        for work in tp.deferred.drain() if tp else ():
            work()
    return [tensor.grad.clone() for tensor in wanted]


@pytest.mark.parametrize("deferred", [False, True])
def test_columns_and_rows_with_adapters_are_plain_torch(deferred):
    torch.manual_seed(0)
    tp = TensorParallel()
    tp.deferred.enabled = deferred
    gate, up = (filled(ColumnParallelLinear(tp, WIDTH, FEATURES, bias=True, std=1.0)) for _ in range(2))
    down = filled(RowParallelLinear(tp, FEATURES, WIDTH, bias=True, std=1.0))
    x = torch.randn(ROWS, SEQ, WIDTH, dtype=torch.float64, requires_grad=True)

    def gated(left, right):
        return F.silu(left) * right

    def ours():
        return (down(*column_parallel(tp, x, [gate, up]), activation=gated),)

    def theirs():
        return (plain(down, gated(plain(gate, x), plain(up, x))),)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-12, atol=1e-12)
    layers = (gate, up, down)
    for mine, other in zip(gradients(ours, [x], layers, tp), gradients(theirs, [x], layers), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_deferred_weight_gradients_are_not_there_before_they_are_asked_for():
    """In a zero-bubble schedule nobody waits for them: of a microbatch that is the first, and of one that follows."""
    tp = TensorParallel()
    tp.deferred.enabled = True
    layer = ColumnParallelLinear(tp, WIDTH, FEATURES, bias=True, std=1.0)
    for number in range(2):
        before = None if layer.weight.grad is None else layer.weight.grad.clone()
        layer(torch.ones(ROWS, SEQ, WIDTH)).sum().backward()
        if before is None:
            assert layer.weight.grad is None
        else:
            assert torch.equal(layer.weight.grad, before)
        assert torch.equal(layer.bias.grad, torch.full([FEATURES], ROWS * SEQ * (number + 1.0)))
        (work,) = tp.deferred.drain()
        work()
        assert torch.equal(layer.weight.grad, torch.full([FEATURES, WIDTH], ROWS * SEQ * (number + 1.0)))


def test_a_gradient_has_its_shape_where_the_weight_has_been_emptied():
    """As DeepSpeed's ZeRO-3 empties it between its passes."""
    weight = torch.nn.Parameter(torch.empty(0))
    set_grad(weight, torch.ones(2, 3))
    assert weight.shape == (0,) and torch.equal(weight.grad, torch.ones(2, 3))
