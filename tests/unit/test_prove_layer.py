"""The kit for layers of one's own: a right one passes, one with a forgotten sum is told by what differs."""

from __future__ import annotations

import pytest
import torch

from roots_dist.parallel.tensor.collectives import copy_to_tp_region, reduce_from_tp_region
from roots_dist.testing.layers import LayerDiffers, prove_layer
from roots_dist.world.sharding import ShardSpec, declare


class Scale(torch.nn.Module):
    """Each rank scales its own channels and sums them with its own weights: one number per position."""

    def __init__(self, tp, copies=True, sums=True, partial=True):
        super().__init__()
        self.tp, self.copies, self.sums = tp, copies, sums
        self.weight = declare(self, "weight", ShardSpec(shape=(8,), shard_dim=0, std=1.0), tp.axis)
        self.shift = declare(self, "shift", ShardSpec(shape=(), fill=0.5, partial=partial), tp.axis)

    def forward(self, x):
        x = copy_to_tp_region(x, self.tp) if self.copies else x
        mine = x[..., self.tp.axis.rank * len(self.weight) :][..., : len(self.weight)]
        y = (mine * self.weight + self.shift).sum(-1)
        return reduce_from_tp_region(y, self.tp) if self.sums else y


def without_backward_sum(tp):
    return Scale(tp, copies=False)


def without_sum(tp):
    return Scale(tp, sums=False)


def without_partial(tp):
    return Scale(tp, partial=False)


def test_a_right_layer_is_proven():
    rows = prove_layer(Scale, (2, 3, 8), sizes=(2,))
    assert {row.what.partition(",")[0].partition(" ")[0] for row in rows} == {
        "output", "input.grad", "layer.weight.grad", "layer.shift.grad",
    }  # fmt: skip
    assert max(row.difference for row in rows) < 1e-14


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (without_backward_sum, "input.grad, rank 0 of 2"),
        (without_sum, "output, rank 0 of 2"),
        (without_partial, "layer.shift.grad of 2 ranks"),
    ],
)
def test_a_forgotten_sum_is_told(build, words):
    with pytest.raises(LayerDiffers, match=words):
        prove_layer(build, (2, 3, 8), sizes=(2,))
