"""How evenly the tokens of training are spread over experts: counts of all ranks, and what they say together.

    Experts.load on each rank --expert_loads: summed over the world--> {layer: tokens of each expert} --load_metrics-->

Counts are integers, so that they do not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from roots_dist.assembly.run import Run
from roots_dist.learning.models.experts import Experts


def expert_loads(run: Run) -> dict[str, list[int]]:
    """Tokens that each expert of each layer has got since the last call; none if the model has no experts. Collective
    over the world."""
    m, mesh = run.config.model, run.mesh
    names = [f"blocks.{number}" for number in range(m.layers) if m.has_experts(number)]
    if not names:
        return {}
    loads = torch.zeros(len(names), m.experts or 0, dtype=torch.int64, device=mesh.device)
    for layer in (module for module in run.passes.model.module.modules() if isinstance(module, Experts)):
        load = layer.take_load()
        if load is not None and mesh.tp.rank == 0:  # every tensor rank has counted the same tokens
            loads[names.index(layer.name)] = load
    return dict(zip(names, mesh.world.sum_(loads).tolist()))


def load_metrics(loads: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """What the counts say of all layers together."""
    shares = [[count * len(counts) / total for count in counts] for counts in loads.values() if (total := sum(counts))]
    if not shares:
        return {}
    return {
        "experts/largest_load": max(map(max, shares)),
        "experts/smallest_load": min(map(min, shares)),
        "experts/entropy": sum(map(_entropy, shares)) / len(shares),
        "experts/dropped": 0.0,
    }


def _entropy(shares: Sequence[float]) -> float:
    """Entropy of the counts, as a fraction of that of even ones: 1 where all experts get as much, 0 where one gets all.
    shares: in units of their mean."""
    number = len(shares)
    return -sum(share / number * math.log(share / number) for share in shares if share) / math.log(number)
