"""Locations of all parameters of the whole model, on any rank and without their values.

    [PieceSpec] --built on the meta device, nothing is allocated or drawn--> {global name: ParameterLocation}

parallel/optim/trainable.py chooses the trainable parameters from it, identically on every rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from roots_dist.learning.models.pieces import PieceSpec
from roots_dist.world.sharding import Param, parameters_of


class ParameterLocation(NamedTuple):
    """The location of a parameter in the model."""

    piece: int
    depth: int
    """0 above all blocks, 1 in the last block, 2 in the block below it …; pieces between two blocks or below all of
    them are one deeper than the block above them"""
    by_rule: bool = False
    """True if the parameter never learns by a gradient."""


def locate_parameters(specs: Sequence[PieceSpec]) -> dict[str, ParameterLocation]:
    """Location of every parameter except copies, in the order of the computation."""
    found: dict[str, ParameterLocation] = {}
    blocks = [0, *accumulate(spec.is_block for spec in specs)]  # blocks[i] is their number in the first i pieces
    for i, p in _parameters(specs):
        above = blocks[-1] - blocks[i + 1]
        found.setdefault(p.name, ParameterLocation(i, above + 1 if above or specs[i].is_block else 0, p.spec.by_rule))
    return found


def depths_of(specs: Sequence[PieceSpec]) -> dict[str, int]:
    """Depth of every parameter except copies, by which parallel/optim/trainable.py chooses."""
    return depths_at(locate_parameters(specs))


def depths_at(locations: Mapping[str, ParameterLocation]) -> dict[str, int]:
    """The same of those that are located already; those that never learn by a gradient are not among them."""
    return {name: location.depth for name, location in locations.items() if not location.by_rule}


def shapes(specs: Sequence[PieceSpec]) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter except copies, in the order of the computation."""
    return {p.name: p.spec.shape for _, p in _parameters(specs) if not p.is_copy}


def _parameters(specs: Sequence[PieceSpec]) -> list[tuple[int, Param]]:
    """Every parameter once, with the index of its piece. The first piece of each kind is built; the others have the
    same parameters under other names."""
    built: dict[str, nn.Module] = {}
    found: list[tuple[int, Param]] = []
    first: dict[Hashable, tuple[str, list[Param]]] = {}
    seen: set[int] = set()
    for i, spec in enumerate(specs):
        if spec.kind in first:
            like, params = first[spec.kind]
            params = [Param(spec.name + p.name.removeprefix(like), p.tensor, p.spec, p.tp) for p in params]
        else:
            with torch.device("meta"):
                built[spec.name] = spec.build(built)
            params = [p for p in parameters_of([(spec.name, built[spec.name])]) if id(p.tensor) not in seen]
            seen |= {id(p.tensor) for p in params}
            if spec.kind is not None:
                first[spec.kind] = spec.name, params
        found += [(i, p) for p in params]
    return found
