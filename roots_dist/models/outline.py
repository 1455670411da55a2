"""The whole model on one rank as nothing but names: where each parameter stands, on this rank or on another.

    [PieceSpec] --on the meta device, nothing is allocated or drawn--> {global name: Place}

What learns (optim/phases.py) is chosen from it, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from roots_dist.models.pieces import PieceSpec
from roots_dist.sharding import parameters_of


class Place(NamedTuple):
    piece: int
    depth: int
    """0 above all blocks, 1 in the last block, 2 in the one below it …; what stands between two blocks or below them all
    is one deeper than the block above it"""


def outline(specs: Sequence[PieceSpec]) -> dict[str, Place]:
    """Of every parameter, copies left out, in the order of the computation."""
    built: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for spec in specs:
            built[spec.name] = spec.build(built)
    found: dict[str, Place] = {}
    seen: set[int] = set()
    for i, spec in enumerate(specs):
        above = sum(s.is_block for s in specs[i + 1 :])
        for p in parameters_of([(spec.name, built[spec.name])]):
            if id(p.tensor) not in seen:
                found.setdefault(p.name, Place(i, above + 1 if above or spec.is_block else 0))
            seen.add(id(p.tensor))
    return found
