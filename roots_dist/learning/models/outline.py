"""The whole model on one rank as nothing but names: where each parameter stands, on this rank or on another.

    [PieceSpec] --on the meta device, nothing is allocated or drawn--> {global name: Place}

What learns (parallel/optim/trainable.py) is chosen from it, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from roots_dist.learning.models.pieces import PieceSpec
from roots_dist.world.sharding import Param, parameters_of


class Place(NamedTuple):
    piece: int
    depth: int
    """0 above all blocks, 1 in the last block, 2 in the one below it …; what stands between two blocks or below them
    all is one deeper than the block above it"""


def outline(specs: Sequence[PieceSpec]) -> dict[str, Place]:
    """Of every parameter, copies left out, in the order of the computation."""
    found: dict[str, Place] = {}
    for i, p in _parameters(specs):
        above = sum(s.is_block for s in specs[i + 1 :])
        found.setdefault(p.name, Place(i, above + 1 if above or specs[i].is_block else 0))
    return found


def shapes(specs: Sequence[PieceSpec]) -> dict[str, tuple[int, ...]]:
    """Of every whole parameter, copies left out, in the order of the computation."""
    return {p.name: p.spec.shape for _, p in _parameters(specs) if not p.is_copy}


def _parameters(specs: Sequence[PieceSpec]) -> list[tuple[int, Param]]:
    """Each once, with the number of the piece that has it."""
    built: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for spec in specs:
            built[spec.name] = spec.build(built)
    found: list[tuple[int, Param]] = []
    seen: set[int] = set()
    for i, spec in enumerate(specs):
        for p in parameters_of([(spec.name, built[spec.name])]):
            if id(p.tensor) not in seen:
                found.append((i, p))
            seen.add(id(p.tensor))
    return found
