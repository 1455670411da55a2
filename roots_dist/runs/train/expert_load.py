"""The load of experts, which is the spread of tokens over them: counts of all ranks, what they say, and the rule that
makes them even without a loss.

    Experts.loads on each rank --expert_loads: summed over the world--> {layer: tokens of each expert} --> load_metrics
                               --balance_by_bias: summed over data ranks, after each step--> biases of routers

Counts are integers, so that they do not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from roots_dist.assembly.run import Run
from roots_dist.learning.models.experts import OF_REPORT, OF_STEP, Experts


def expert_loads(run: Run) -> dict[str, list[int]]:
    """Tokens that each expert of each layer has got since the last call; none if the model has no experts. Collective
    over the world."""
    m, mesh = run.config.model, run.mesh
    names = [f"blocks.{number}" for number in range(m.layers) if m.has_experts(number)]
    if not names:
        return {}
    loads = torch.zeros(len(names), m.experts or 0, dtype=torch.int64, device=mesh.device)
    for layer in _layers(run):
        load = layer.take_load(OF_REPORT)
        if load is not None and mesh.tp.rank == 0:  # every tensor rank has counted the same tokens
            loads[names.index(layer.name)] = load
    return dict(zip(names, mesh.world.sum_(loads).tolist()))


def _layers(run: Run) -> list[Experts]:
    return [module for module in run.passes.model.module.modules() if isinstance(module, Experts)]


@contextmanager
def without_counting(run: Run) -> Iterator[None]:
    """Leave the loads as they are while microbatches are computed that are no part of a step."""
    before = [(layer, layer.loads) for layer in _layers(run)]
    for layer, _ in before:
        layer.loads = {}
    yield
    for layer, loads in before:
        layer.loads = loads


def load_metrics(loads: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Metrics of all layers together, from their counts."""
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


StepLoads = list[tuple[Experts, Tensor]]
"""Layers whose router has a bias that learns, with the tokens that this rank has sent to each expert in a step."""


def take_step_loads(run: Run, step: int) -> StepLoads:
    """Take the loads of the step that has been computed, whose number counts from 0."""
    layers = _layers(run)
    held = {id(p.tensor): p.name for p in run.params}

    def learns(layer: Experts) -> bool:
        trained = run.engine.trainable.get(held[id(layer.router.weight)])
        return trained is not None and trained.from_step <= step

    loads = ((layer, layer.take_load(OF_STEP)) for layer in layers)
    return [(layer, load) for layer, load in loads if load is not None and learns(layer)]


@torch.no_grad()
def balance_by_bias(run: Run, loads: StepLoads) -> None:
    """Move the bias of each expert by optim.router_bias_rate: up if it got fewer tokens of the step than the mean of
    its layer, down if it got more (Wang et al. 2024, algorithm 1; DeepSeek-V3, 2.1.2). Counts are integers of the whole
    step, so that no layout changes a bias. Collective over dp × cp."""
    if not loads:
        return
    counts = run.mesh.dp_cp.sum_(torch.stack([load for _, load in loads]))
    below = torch.sign(counts.sum(1, keepdim=True) - counts * counts.shape[1])  # 1, 0 or -1
    held = {id(p.tensor): p.name for p in run.params}
    for (layer, _), signs in zip(loads, below):
        name = held[id(layer.router.bias)]
        bias = run.engine.read_state(name)["weight"]
        run.engine.write_state(name, {"weight": bias + run.config.optim.router_bias_rate * signs.to(bias.dtype)})
