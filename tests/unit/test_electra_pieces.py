"""The discriminator's pieces are an encoder's, and hand on which tokens the generator has replaced."""

from __future__ import annotations

from dataclasses import replace

import torch

from roots_dist.config.schema import Config
from roots_dist.learning.models import electra
from roots_dist.learning.models.pieces import PieceSpec
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import MicroBatch


def test_what_an_encoder_says_of_a_piece_is_said_of_the_discriminators(monkeypatch):
    """Every field has a value of its own here, so that one in the place of another is seen."""
    hidden = {"hidden": ((3, 8, 16), torch.float32)}
    said = PieceSpec(
        "blocks.0",
        lambda built: torch.nn.Identity(),
        3.0,
        lambda batch: hidden,
        is_block=True,
        prefill_only=True,
        shared_params=("embed.tokens.weight",),
    )
    monkeypatch.setattr(electra, "encoder_pieces", lambda *of: (said,))
    model = {"family": "electra", "segments": 2, "norm_position": "post", "layers": 1, "hidden": 16, "heads": 2}
    config = Config.model_validate({"model": model | {"vocab": 61}, "objective": {"name": "rtd"}})
    *_, piece, _head = electra.pieces(config, TensorParallel())
    assert piece == replace(said, out=piece.out)
    batch = MicroBatch(tokens=torch.zeros(3, 8, dtype=torch.int64), targets=None, sample_ids=torch.arange(3))
    assert piece.out(batch) == hidden | {"tokens": ((3, 8), torch.int64)}
