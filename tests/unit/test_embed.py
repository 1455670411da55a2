"""Learned positions that begin as sinusoids: as large as drawn ones, and how alike two places are goes by their
distance alone."""

import torch

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.world.mesh import Mesh


def places(start: bool) -> torch.Tensor:
    sections = {"model": {"hidden": 64, "layers": 1, "init_std": 0.3, "max_positions": 24}, "data": {"seq_length": 16}}
    model = build_model(Config.model_validate(sections | {"advanced": {"sinusoidal_init": start}}), Mesh.single())
    (table,) = (p.tensor.detach() for p in model.params if p.name == "embed.position_embedding")
    assert table.shape == (24, 64)
    return table


def test_places_begin_as_waves():
    waves, drawn = places(True), places(False)
    assert torch.allclose(waves.square().mean(1).sqrt(), torch.full((24,), 0.3), rtol=1e-4)
    assert abs(drawn.square().mean().sqrt() - 0.3) < 0.03
    alike = waves @ waves.T
    for distance in range(1, 8):
        diagonal = alike.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4)
        assert diagonal[0] < alike.diagonal(distance - 1)[0]
    assert (drawn @ drawn.T).diagonal(1).std() > 0.1
