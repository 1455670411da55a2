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


class Otherwise(Scale):
    """Right, but for what becomes of its output where there are several ranks."""

    def __init__(self, tp, change):
        super().__init__(tp)
        self.change = change

    def forward(self, x):
        y = super().forward(x)
        return self.change(y, self.tp.axis.rank) if self.tp.axis.size > 1 else y


def exchanges_gradients(tp):
    def change(y, rank):
        y.register_hook(lambda gradient: gradient.flip(0))
        return y

    return Otherwise(tp, change)


def is_off_on_rank_1(tp):
    return Otherwise(tp, lambda y, rank: y + 1e-6 * rank)


def is_no_number(tp):
    return Otherwise(tp, lambda y, rank: y * float("nan"))


def has_another_shape(tp):
    return Otherwise(tp, lambda y, rank: y[None])


def test_a_right_layer_is_proven():
    rows = prove_layer(Scale, (2, 3, 8), sizes=(2,))
    assert {row.what.partition(",")[0].partition(" ")[0] for row in rows} == {
        "output", "input.grad", "layer.weight.grad", "layer.shift.grad",
    }  # fmt: skip
    assert max(row.difference for row in rows) < 1e-14


WRONG = {
    "no sum backward": (without_backward_sum, "more than 1e-10: input.grad, rank 0 of 2"),
    "no sum": (without_sum, "output, rank 0 of 2"),
    "a partial gradient that is said to be whole": (without_partial, "layer.shift.grad of 2 ranks"),
    "an exchange of gradients": (exchanges_gradients, "more than 1e-10: input.grad, rank 0 of 2"),
    "one rank alone": (is_off_on_rank_1, "more than 1e-10: output, rank 1 of 2 by"),
    "not a number": (is_no_number, "output, rank 0 of 2 by nan"),
    "another shape": (has_another_shape, "output, rank 0 of 2 by inf"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_told(what):
    build, words = WRONG[what]
    with pytest.raises(LayerDiffers, match=words):
        prove_layer(build, (2, 3, 8), sizes=(2,))
