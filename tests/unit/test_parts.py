"""Parts of a payload: each tensor rank sends one, and nothing but it stays alive."""

import pytest
import torch

from roots_dist.parallel.pipeline.parts import empty_part, part_of
from roots_dist.world.mesh import SINGLE, Axis


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1,)])
def test_the_parts_of_all_ranks_are_the_whole(shape):
    """Also where there are fewer numbers than ranks would divide."""
    whole = torch.arange(1, torch.Size(shape).numel() + 1)
    axes = [Axis("tp", 4, rank, (0, 1, 2, 3)) for rank in range(4)]
    parts = [part_of(whole.view(shape), axis) for axis in axes]
    assert torch.cat(parts)[: whole.numel()].equal(whole)
    assert all(part.shape == empty_part(shape, whole.dtype, whole.device, axes[0]).shape for part in parts)


def test_a_part_does_not_keep_the_whole():
    """A message lives until it has arrived: on gloo until the backward pass of its microbatch."""
    whole = torch.zeros(8, 6)
    assert part_of(whole, Axis("tp", 4, 1, (0, 1, 2, 3))).untyped_storage().nbytes() == whole.nbytes // 4
    assert part_of(whole, SINGLE).data_ptr() == whole.data_ptr()
