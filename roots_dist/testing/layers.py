"""Prove a parallel layer of one's own: on any number of tensor ranks it computes what it computes on one.

    build(tp), input --on_world(1), on_world(n)--> output, gradient of the input and of every parameter --> rows

In float64, from weights that are drawn by name. B, S and D of the input are the layer's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roots_dist.layout import Layout
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import assemble, ensure_grad, initialize, parameters_of, sum_partial_gradients

BOUND = 1e-10
Build = Callable[[TensorParallel], nn.Module]


class Compared(NamedTuple):
    """One tensor of one rank against one process."""

    what: str
    """output, input.grad, or the gradient of a parameter by its name; with the rank if every rank has its own."""
    difference: float
    """Largest absolute difference over the largest number of one process."""


class LayerDiffers(AssertionError):
    """A layer on several ranks does not compute what it computes on one."""


def prove_layer(
    build: Build, shape: Sequence[int], *, sizes: Sequence[int] = (2, 4), seed: int = 1, bound: float = BOUND
) -> list[Compared]:
    """Compare a layer on each of these numbers of tensor ranks with one process. `build` is a module's own function
    that makes the layer for the ranks it is handed; its parameters are declared (roots_dist.world.sharding). The layer
    maps a float tensor of `shape`, equal on all ranks, to one that is equal on all ranks. Raises LayerDiffers."""
    (alone,) = on_world(1, _passed, build, tuple(shape), seed)
    rows: list[Compared] = []
    for size in sizes:
        ranks = on_world(size, _passed, build, tuple(shape), seed)
        for what in ("output", "input.grad"):
            rows += [
                Compared(f"{what}, rank {r} of {size}", _far(one[what], alone[what])) for r, one in enumerate(ranks)
            ]
        for name, whole in alone["grads"].items():
            slices = [(tuple(slice(*s) for s in one["slices"][name]), one["grads"][name]) for one in ranks]
            for index, part in slices:  # copies too, each for itself
                rows.append(Compared(f"{name}.grad of {size} ranks", _far(part, whole[index])))
            rows.append(Compared(f"{name}.grad, all of {size} ranks", _far(assemble(whole.shape, slices), whole)))
    if wrong := [row for row in rows if not row.difference <= bound]:
        told = ", ".join(f"{row.what} by {row.difference:.1e}" for row in wrong[:5])
        raise LayerDiffers(f"differs from one process by more than {bound:g}: {told}")
    return rows


def _far(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-300))


def _passed(rank: int, size: int, build: Build, shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    layer = build(TensorParallel(Mesh.connect(Layout(tp=size), rank).tp))
    params = parameters_of([("layer", layer)])
    initialize(params, seed)
    x = torch.linspace(-1, 1, int(torch.tensor(shape).prod())).sin().mul(3).view(shape).requires_grad_()
    y = layer(x)
    weights = torch.linspace(0.5, 1.5, y.numel()).cos().view_as(y)  # else equal gradients would hide an exchange
    (y * weights).sum().backward()
    sum_partial_gradients((p, ensure_grad(p)) for p in params)
    return {
        "output": y.detach(),
        "input.grad": x.grad,
        "grads": {p.name: p.tensor.grad for p in params},
        "slices": {p.name: [(s.start, s.stop) for s in _whole(p.slices, p.spec.shape)] for p in params},
    }


def _whole(slices: Sequence[slice], shape: Sequence[int]) -> list[slice]:
    return [slice(*s.indices(n)[:2]) for s, n in zip(slices, shape)]
