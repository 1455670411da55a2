"""Linear layers in one process, with adapters, an activation that is recomputed and put-off weight gradients, are
plain torch."""

import pytest
import torch
import torch.nn.functional as F

from roots_dist.parallel.tensor import linear
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from roots_dist.runs.plan.rank_cost import RecordingGroup
from roots_dist.world.mesh import Axis
from roots_dist.world.sharding import Param, ShardSpec, set_grad, sum_tied_gradients

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


@pytest.mark.parametrize("sizes, messages", [((WIDTH,), 1), ((WIDTH, WIDTH), 1), ((WIDTH, WIDTH, WIDTH), 1)])
def test_gradients_of_the_inputs_of_a_region_are_summed_in_one_message(sizes, messages):
    group = RecordingGroup(2)
    found = linear._start_sums(
        [torch.ones(ROWS, SEQ, size) for size in sizes], TensorParallel(Axis("tp", 2, 0, (0, 1), group))
    )()
    assert len(group.messages) == messages and [g.shape for g in found] == [(ROWS, SEQ, size) for size in sizes]


def test_a_gradient_has_its_shape_where_the_weight_has_been_emptied():
    """As DeepSpeed's ZeRO-3 empties it between its passes."""
    weight = torch.nn.Parameter(torch.empty(0))
    set_grad(weight, torch.ones(2, 3))
    assert weight.shape == (0,) and torch.equal(weight.grad, torch.ones(2, 3))


def test_gradients_that_stages_share_are_summed_in_the_order_of_their_names():
    """Two ranks may have built them in another order, and would sum one with the other's."""
    summed = []

    class Recorded(Axis):
        def sum_(self, tensor):
            summed.append(tensor)
            return tensor

    spec, axis = ShardSpec(shape=(2,)), Recorded("tied", 2)
    gradients = [(Param(name, torch.nn.Parameter(torch.ones(2)), spec, Axis("tp")), torch.ones(2)) for name in "bca"]
    sum_tied_gradients(gradients, {"a": axis, "b": axis})
    assert len(summed) == 2 and summed[0] is gradients[2][1] and summed[1] is gradients[0][1]
