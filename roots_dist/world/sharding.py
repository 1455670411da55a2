"""How a parameter is cut over tensor ranks, written once, beside where the parameter is made.

    module: declare(self, "weight", ShardSpec(...), tp) --parameters_of(stage)--> [Param(name, tensor, spec, ...)]

Init, gradient sums, norm, decay, checkpoint, exchange, planner and proof read these Params; nobody parses names or asks
isinstance. The spec lives on the module: attributes on an nn.Parameter are lost by deepcopy and load_state_dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roots_dist.errors import present
from roots_dist.world import rng
from roots_dist.world.mesh import Axis


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """What is true of a parameter in every layout, in global numbers."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    cut: int | None = None
    """The dimension that is cut over tensor ranks, or none: every rank holds all of it."""
    parts: int | None = None
    """Into how many slices `cut` is cut; default: one per tensor rank. With fewer, neighbouring ranks hold the same
    slice (key/value heads fewer than tensor ranks)."""
    std: float | None = None
    """Initial weights: normal with this standard deviation, or, if none, all equal to `fill`."""
    fill: float = 0.0
    first: Callable[[], Tensor] | None = None
    """Makes the whole parameter as it is at first, where it is neither drawn nor all equal."""
    partial: bool = False
    """Each rank that holds the same slice computes only its part of the slice's gradient: they are summed."""
    copy_of: str | None = None
    """The global name of the parameter that this one is a copy of, on another pipeline stage (tied embedding). The
    gradients of all copies are summed."""

    def num_parts(self, tp: Axis) -> int:
        if self.cut is None:
            return 1
        parts = self.parts or tp.size
        assert tp.size % parts == 0 and self.shape[self.cut] % parts == 0, (self, tp.size)
        return parts

    def part(self, tp: Axis) -> int:
        """Which slice this rank holds."""
        return tp.rank * self.num_parts(tp) // tp.size

    def mine(self, tp: Axis) -> tuple[slice, ...]:
        """Where this rank's slice lies in the whole parameter."""
        index = [slice(0, n) for n in self.shape]
        if self.cut is not None:
            size = self.shape[self.cut] // self.num_parts(tp)
            start = self.part(tp) * size
            index[self.cut] = slice(start, start + size)
        return tuple(index)

    def local_shape(self, tp: Axis) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.mine(tp))


@dataclass(frozen=True, eq=False)
class Param:
    """A parameter as this rank holds it, under the name that it has in every layout."""

    name: str
    tensor: nn.Parameter
    spec: ShardSpec
    tp: Axis

    @property
    def is_copy(self) -> bool:
        """The second copy of a tied parameter: not counted in norm, parameter count and checkpoint."""
        return self.spec.copy_of is not None

    @property
    def replicas(self) -> int:
        """How many tensor ranks hold the same slice as this one."""
        return self.tp.size // self.spec.num_parts(self.tp)

    @property
    def counts_here(self) -> bool:
        """Exactly one rank of the model (pp × tp) counts each slice of each parameter."""
        return not self.is_copy and self.tp.rank % self.replicas == 0

    @property
    def mine(self) -> tuple[slice, ...]:
        return self.spec.mine(self.tp)

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices: recognised by shape, so that an alias of a norm class cannot escape it."""
        return len(self.spec.shape) >= 2


def declare(module: nn.Module, name: str, spec: ShardSpec, tp: Axis) -> nn.Parameter:
    """Make this rank's slice of a parameter, uninitialised, and write its spec beside it."""
    parameter = nn.Parameter(torch.empty(spec.local_shape(tp)))
    module.register_parameter(name, parameter)
    module.__dict__.setdefault("shard_specs", {})[name] = (spec, tp)
    return parameter


def parameters_of(pieces: Iterable[tuple[str, nn.Module]]) -> list[Param]:
    """Every parameter of the named pieces, in order, each once; a copy bears the name of its original."""
    found: dict[int, Param] = {}
    for piece_name, piece in pieces:
        for path, module in piece.named_modules(prefix=piece_name):
            for name, (spec, tp) in getattr(module, "shard_specs", {}).items():
                tensor = module.get_parameter(name)
                full_name = spec.copy_of or f"{path}.{name}"
                found.setdefault(id(tensor), Param(full_name, tensor, spec, tp))
    return list(found.values())


@torch.no_grad()
def initialize(params: Sequence[Param], seed: int) -> None:
    """Draw each parameter from (seed, its global name), just the slice that this rank holds."""
    for p in params:
        if p.spec.first is not None:
            p.tensor.copy_(p.spec.first()[p.mine])
            continue
        if p.spec.std is None:
            p.tensor.fill_(p.spec.fill)
            continue
        rows, *rest = (range(s.start, s.stop) for s in p.mine)
        assert len(rest) <= 1, f"{p.name}: only vectors and matrices are drawn, not {p.spec.shape}"
        columns = rest[0] if rest else range(1)
        rng.normal_(p.tensor.view(len(rows), len(columns)), rng.key("init", seed, p.name), rows, columns, p.spec.std)


@torch.no_grad()
def gradient_of(p: Param) -> Tensor:
    """The parameter's .grad on this rank, to be changed in place; made of zeros if no backward has reached it."""
    if p.tensor.grad is None:
        data = p.tensor.data  # empty where ZeRO-3 has the weight cut, and a .grad must fit what it is assigned to
        p.tensor.data = data.new_empty(p.spec.local_shape(p.tp))
        p.tensor.grad = torch.zeros_like(p.tensor)
        p.tensor.data = data
    return present(p.tensor.grad)


@torch.no_grad()
def sum_partial_gradients(params: Sequence[Param]) -> None:
    """Sum the gradients that tensor ranks hold only in part, in one message. Collective over tp, once per step.

    Where a slice is held by some of the ranks only (key/value heads), each rank writes its part into its slice's
    place of a zeroed whole: no extra groups, and these parameters are small.
    """
    partial = [p for p in params if p.spec.partial and p.replicas > 1 and p.tensor.requires_grad]
    if not partial:
        return
    places = [p.tensor.new_zeros(p.spec.num_parts(p.tp), *p.spec.local_shape(p.tp)) for p in partial]
    for place, p in zip(places, partial):
        place[p.spec.part(p.tp)] = gradient_of(p)
    flat = partial[0].tp.sum_(torch.cat([place.flatten() for place in places]))
    for place, piece, p in zip(places, flat.split([place.numel() for place in places]), partial):
        gradient_of(p).copy_(piece.view_as(place)[p.spec.part(p.tp)])


@torch.no_grad()
def sum_tied_gradients(params: Sequence[Param], ties: Mapping[str, Axis]) -> None:
    """Sum the gradients of parameters that several pipeline ranks hold. ties: name -> those ranks, for this rank's.

    Collective over each axis, once per step. In the order of names: two ranks that share several agree on it.
    """
    for p in sorted((p for p in params if p.name in ties and p.tensor.requires_grad), key=lambda p: p.name):
        ties[p.name].sum_(gradient_of(p))


def assemble(shape: Sequence[int], slices: Iterable[tuple[tuple[slice, ...], Tensor]]) -> Tensor:
    """The whole parameter from slices that cover it."""
    whole: Tensor | None = None
    for mine, tensor in slices:
        whole = tensor.new_empty(tuple(shape)) if whole is None else whole
        whole[mine] = tensor
    assert whole is not None
    return whole
