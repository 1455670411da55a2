"""The sharding of a parameter over tensor ranks, declared once, beside the line that creates the parameter.

    module: declare(self, "weight", ShardSpec(...), tp) --parameters_of(stage)--> [Param(name, tensor, spec, ...)]

Initialization, gradient sums, norm, weight decay, checkpoints, exchange, planner and proof read these Params; nobody
parses names or uses isinstance. The spec lives on the module because attributes of an nn.Parameter are lost by deepcopy
and load_state_dict.
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
    """Properties of a parameter that hold in every layout, in global sizes."""

    shape: tuple[int, ...]
    """Shape of the global parameter."""
    shard_dim: int | None = None
    """Dimension that is sharded over tensor ranks; None if every rank holds the whole parameter."""
    shards: int | None = None
    """Number of slices of shard_dim; by default one per tensor rank. With fewer, neighbouring ranks hold the same slice
    (fewer key/value heads than tensor ranks)."""
    std: float | None = None
    """Standard deviation of normal initial weights; if None, every entry is `fill`."""
    fill: float = 0.0
    init: Callable[[], Tensor] | None = None
    """Function that creates the whole initial parameter, for one that is neither random nor constant."""
    partial: bool = False
    """True if each rank that holds the slice computes only a part of its gradient, so that the parts must be summed."""
    copy_of: str | None = None
    """Global name of the parameter that this one copies on another pipeline stage (tied embedding). Gradients of all
    copies are summed."""
    of_expert: bool = False
    """True if it belongs to one of a layer's experts, which only some ranks of dp × cp hold."""
    by_rule: bool = False
    """True if a rule of the step changes it instead of a gradient (a router's bias). Its dtype is float32 or wider."""

    def num_shards(self, tp: Axis) -> int:
        """Number of different slices on these tensor ranks."""
        if self.shard_dim is None:
            return 1
        shards = self.shards or tp.size
        assert tp.size % shards == 0 and self.shape[self.shard_dim] % shards == 0, (self, tp.size)
        return shards

    def shard_index(self, tp: Axis) -> int:
        """Index of the slice that this rank holds."""
        return tp.rank * self.num_shards(tp) // tp.size

    def slices(self, tp: Axis) -> tuple[slice, ...]:
        """Position of this rank's slice in the global parameter."""
        index = [slice(0, n) for n in self.shape]
        if self.shard_dim is not None:
            size = self.shape[self.shard_dim] // self.num_shards(tp)
            start = self.shard_index(tp) * size
            index[self.shard_dim] = slice(start, start + size)
        return tuple(index)

    def local_shape(self, tp: Axis) -> tuple[int, ...]:
        """Shape of this rank's slice."""
        return tuple(s.stop - s.start for s in self.slices(tp))


@dataclass(frozen=True, eq=False)
class Param:
    """A parameter as this rank holds it, under the name that it has in every layout."""

    name: str
    tensor: nn.Parameter
    spec: ShardSpec
    tp: Axis

    @property
    def is_copy(self) -> bool:
        """True if this is a further copy of a tied parameter, which norm, parameter count and checkpoint skip."""
        return self.spec.copy_of is not None

    @property
    def replicas(self) -> int:
        """Number of tensor ranks that hold this same slice."""
        return self.tp.size // self.spec.num_shards(self.tp)

    @property
    def is_summed_over_tp(self) -> bool:
        """True if the gradients of this slice on several tensor ranks are parts of one sum."""
        return self.spec.partial and self.replicas > 1

    @property
    def is_counted(self) -> bool:
        """True if this rank counts the slice: exactly one rank of the model (pp × tp) counts each slice of each
        parameter."""
        return not self.is_copy and self.tp.rank % self.replicas == 0

    @property
    def slices(self) -> tuple[slice, ...]:
        return self.spec.slices(self.tp)

    @property
    def decays(self) -> bool:
        """True if weight decay applies: only to matrices, recognized by shape so that no norm class is missed."""
        return len(self.spec.shape) >= 2


ParamTensor = tuple[Param, Tensor]
"""A parameter and a tensor that belongs to it, as its gradient: whole, or the same elements on all ranks that are
summed over."""


def declare(module: nn.Module, name: str, spec: ShardSpec, tp: Axis) -> nn.Parameter:
    """Create this rank's slice of a parameter, uninitialized, and record its spec beside it."""
    parameter = nn.Parameter(torch.empty(spec.local_shape(tp)))
    module.register_parameter(name, parameter)
    module.__dict__.setdefault("shard_specs", {})[name] = (spec, tp)
    return parameter


def spec_of(module: nn.Module, name: str) -> ShardSpec:
    """Return the spec that a module's own parameter has been declared with."""
    spec, _ = module.__dict__["shard_specs"][name]
    found: ShardSpec = spec
    return found


def parameters_of(pieces: Iterable[tuple[str, nn.Module]]) -> list[Param]:
    """Every parameter of the named pieces once, in order; a copy has the name of its original."""
    found: dict[int, Param] = {}
    for piece_name, piece in pieces:
        for path, module in piece.named_modules(prefix=piece_name):
            for name, (spec, tp) in getattr(module, "shard_specs", {}).items():
                tensor = module.get_parameter(name)
                full_name = spec.copy_of or f"{path}.{name}"
                found.setdefault(id(tensor), Param(full_name, tensor, spec, tp))
    return list(found.values())


def release(tensors: Iterable[Tensor]) -> None:
    """Give the memory of parameters back; shape, dtype and device stay, and `initialize` takes it again."""
    for tensor in tensors:
        resize(tensor, 0)


def resize(tensor: Tensor, num_bytes: int) -> None:
    """Take or give back a tensor's memory, under all of its views; their shapes stay. An operation, unlike the method
    of the storage, so that whoever counts operations sees it."""
    torch.ops.inductor.resize_storage_bytes_(tensor.detach(), num_bytes)


def initialize_missing(params: Iterable[Param], seed: int) -> None:
    """Initialize the parameters that have no memory yet."""
    initialize([p for p in params if p.tensor.untyped_storage().nbytes() == 0], seed)


@torch.no_grad()
def initialize(params: Sequence[Param], seed: int) -> None:
    """Draw each parameter from (seed, its global name), only the slice that this rank holds. One without memory takes
    it first: neighbours (experts of a layer) theirs together."""
    for p in params:
        end = int(p.tensor.storage_offset() + p.tensor.numel()) * p.tensor.element_size()
        if p.tensor.untyped_storage().nbytes() < end:
            resize(p.tensor, end)
    for p in params:
        if p.spec.init is not None:
            p.tensor.copy_(p.spec.init()[p.slices])
            continue
        if p.spec.std is None:
            p.tensor.fill_(p.spec.fill)
            continue
        rows, *rest = (range(s.start, s.stop) for s in p.slices)
        assert len(rest) <= 1, f"{p.name}: only vectors and matrices are drawn, not {p.spec.shape}"
        columns = rest[0] if rest else range(1)
        rng.normal_(p.tensor.view(len(rows), len(columns)), rng.key("init", seed, p.name), rows, columns, p.spec.std)


def ensure_grad(p: Param) -> Tensor:
    """The parameter's .grad on this rank, to be changed in place; zeros if no backward pass has reached it."""
    return ensure_grad_of(p.tensor, p.spec.local_shape(p.tp))


def ensure_grad_of(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same for a parameter whose shape on this rank is known otherwise."""
    if tensor.grad is None:
        set_grad(tensor, torch.zeros(*shape, dtype=present(tensor.grad_dtype), device=tensor.device))
    return present(tensor.grad)


@torch.no_grad()
def set_grad(tensor: Tensor, gradient: Tensor) -> None:
    """Make a gradient in a parameter's shape on this rank its .grad, though DeepSpeed's ZeRO-3 may have emptied it."""
    data = tensor.data
    if data.shape != gradient.shape:  # .grad must match its tensor in shape
        tensor.data = data.new_empty(gradient.shape)
    tensor.grad = gradient
    tensor.data = data


@torch.no_grad()
def sum_partial_gradients(gradients: Iterable[ParamTensor]) -> None:
    """Sum the gradients that tensor ranks hold only in part, in place and in one message. Collective over tp, once per
    step; all tensor ranks hold the same elements of each gradient.

    Where only some ranks hold a slice (key/value heads), each rank writes its part into a zeroed tensor of all slices:
    this needs no further groups, and these parameters are small.
    """
    partial = [(p, gradient) for p, gradient in gradients if p.is_summed_over_tp]
    if not partial:
        return
    places = [gradient.new_zeros(p.spec.num_shards(p.tp), *gradient.shape) for p, gradient in partial]
    for place, (p, gradient) in zip(places, partial):
        place[p.spec.shard_index(p.tp)] = gradient
    flat = partial[0][0].tp.sum_(torch.cat([place.flatten() for place in places]))
    for place, piece, (p, gradient) in zip(places, flat.split([place.numel() for place in places]), partial):
        gradient.copy_(piece.view_as(place)[p.spec.shard_index(p.tp)])


@torch.no_grad()
def sum_tied_gradients(gradients: Iterable[ParamTensor], ties: Mapping[str, Axis]) -> None:
    """Sum the gradients of parameters that several pipeline ranks hold, in place. `ties` maps a name to the axis over
    those ranks, all of which hold the same elements of it.

    Collective over each axis, once per step. Parameters are visited in the order of their names, so that two ranks that
    share several agree.
    """
    for p, gradient in sorted((g for g in gradients if g[0].name in ties), key=lambda g: g[0].name):
        if gradient.numel():  # of a part of the data ranks' sum there may be nothing here
            ties[p.name].sum_(gradient)


def assemble(shape: Sequence[int], slices: Iterable[tuple[tuple[slice, ...], Tensor]]) -> Tensor:
    """Assemble the whole parameter from slices that cover it."""
    whole: Tensor | None = None
    for index, tensor in slices:
        whole = tensor.new_empty(tuple(shape)) if whole is None else whole
        whole[index] = tensor
    assert whole is not None
    return whole
