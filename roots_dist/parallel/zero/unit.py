"""A unit: parameters whose gradients data ranks sum in one message, and whose weights they gather in one.

    Unit = Flat (what lies where) + Weights (this rank's part, and the whole while it is needed) + Gradients (their sum)

The parameters of a piece (a Transformer block) are a unit, apart from those that other pieces or pipeline ranks use
too, that are trained from another step on, or that other ranks hold copies of: each of these is summed at another time,
or over other ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero.collectives import (
    PendingMessage,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from roots_dist.parallel.zero.flat import Flat
from roots_dist.world.mesh import SINGLE, Axis, Mesh
from roots_dist.world.sharding import Param, initialize_missing, resize
from roots_dist.world.tree_sum import start_tree_all_reduce, start_tree_reduce_scatter


class Weights:
    """A unit's weights in the model's dtype. The parameters are views into one flat tensor, whose memory is given back
    while only this rank's part is needed."""

    def __init__(self, flat: Flat, *, keep_whole: bool, seed: int):
        """keep_whole: the memory is never given back (ZeRO 1 and 2). Weights that have not been drawn are drawn here,
        from `seed`: unit by unit, so that never those of a whole model exist on the way to ZeRO 3."""
        self.flat, self.keep_whole = flat, keep_whole
        initialize_missing(flat.params, seed)
        tensors = [p.tensor for p in flat.params]
        self._whole = flat.joined([tensor.detach() for tensor in tensors], tensors[0].dtype)
        self._bytes = self._whole.untyped_storage().nbytes()
        for tensor, view in zip(tensors, flat.views(self._whole)):
            tensor.data = view
        self.part = self._whole[flat.mine] if keep_whole else self._whole[flat.mine].clone()
        """This rank's part, flat."""
        self._arriving: PendingMessage | None = None
        self.is_held = True
        """True if the whole has its memory, or will have it once what is under way has arrived."""
        self.free()

    def start_gather(self) -> None:
        """Start to gather the whole. Collective over the unit's axis."""
        self.wait()
        if not self.is_held:
            resize(self._whole, self._bytes)
            self.is_held = True
        self._arriving = start_all_gather(self._whole, self.part, self.flat.axis)

    def wait(self) -> None:
        """Wait for what is under way."""
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None

    def free(self) -> None:
        """Give the memory of the whole back, under ZeRO 3. Its part is kept."""
        self.wait()
        if not self.keep_whole and self.is_held:
            resize(self._whole, 0)
            self.is_held = False


class Gradients:
    """Sums a unit's gradients over its axis, each time from what backward passes have left in .grad since the last."""

    def __init__(self, flat: Flat, axis: Axis, replicas: Axis = SINGLE, *, in_order: bool = False):
        """axis: that of the sum. flat.axis is the same if each rank keeps its part of it, single if each keeps the
        whole, or a part of it: then the ranks that keep the same part are `replicas`, and add it up once in a step.
        in_order: the sum is a tree over the ranks (world/tree_sum.py)."""
        self.flat, self.axis, self.in_order = flat, axis, in_order
        self.replicas = replicas
        self._under_way: list[PendingMessage] = []
        self._over_replicas: PendingMessage | None = None
        self._sum: Tensor | None = None
        self.norms: Tensor | None = None
        """Norm of each parameter's gradient on this rank alone, added up over the sums of a step; what is not finite
        stays so."""

    def start(self) -> None:
        """Take the gradients out of .grad and start to sum them. Collective over the axis."""
        gradients = [p.tensor.grad for p in self.flat.params]
        dtype = self.flat.params[0].tensor.grad_dtype
        assert dtype is not None
        self.note_norms(gradients)
        whole = self.flat.joined(gradients, dtype)
        del gradients
        for p in self.flat.params:
            p.tensor.grad = None
        if self.in_order:
            begin = start_tree_all_reduce if self.flat.axis.size == 1 else start_tree_reduce_scatter
            arriving, work, add_up = begin(whole, self.axis)
            self._under_way.append(PendingMessage(work, whole, arriving, add_up))
            return
        is_whole = self.flat.axis.size == 1
        pending = start_all_reduce(whole, self.axis) if is_whole else start_reduce_scatter(whole, self.flat.axis)
        self._under_way.append(pending)

    def note_norms(self, gradients: Sequence[Tensor | None]) -> None:
        """Note the norms of this rank's own gradients, before a nan has spread to other ranks."""
        like = self.flat.params[0].tensor
        found = torch.zeros(len(gradients), dtype=like.grad_dtype, device=like.device)
        held = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
        if held:
            norms = torch.stack(torch._foreach_norm([gradient for _, gradient in held]))
            if len(held) == len(gradients):
                found = norms
            else:
                found[[i for i, _ in held]] = norms
        self.norms = found if self.norms is None else self.norms + found

    def finish(self) -> None:
        """Wait for all sums, and add them up."""
        while self._under_way:
            summed = self._under_way.pop(0).wait()
            self._sum = summed if self._sum is None else self._sum.add_(summed)

    def start_over_replicas(self) -> None:
        """Start to add this rank's part up with those of the ranks that hold the same: the sums of a step are there.
        Collective over `replicas`."""
        if self.replicas.size > 1 and self._over_replicas is None and self._sum is not None:
            self._over_replicas = start_all_reduce(self._sum, self.replicas)

    def finish_over_replicas(self) -> None:
        if self._over_replicas is not None:
            self._over_replicas.wait()

    def of(self, index: int) -> Tensor:
        """The sum for a parameter: in its shape if nothing is cut, else the elements of this rank's part."""
        assert self._sum is not None, f"{self.flat.params[index].name} has no gradient: step() without accumulate()"
        if self.flat.axis.size == 1:
            return self.flat.views(self._sum)[index]
        return self.flat.of_part(index, self._sum)

    def clear(self) -> None:
        self.finish()
        self.finish_over_replicas()
        self._sum = self.norms = self._over_replicas = None


@dataclass(eq=False)
class Unit:
    flat: Flat
    pieces: tuple[nn.Module, ...]
    """The pieces of this rank that use it, in the order of their forward passes."""
    trainable: Trainable | None
    """The step from which it is trained; None if never."""
    gradients: Gradients
    weights: Weights | None
    """None if the parameters stay as they are, whole on every rank."""
    is_trained: bool = False
    """True once the unit is trained."""
    unfinished: set[nn.Module] = field(default_factory=set)
    """Pieces whose last backward pass of the step has not run yet."""
    has_news: bool = False
    """True if a sum is due: a backward pass has run since the last sum began, or none has begun in this step."""


class UnitKey(NamedTuple):
    """The properties that the parameters of a unit have in common."""

    pieces: tuple[int, ...]
    trainable: Trainable | None
    tied: str | None
    axis: Axis
    dtype: torch.dtype


def data_axis(param: Param, mesh: Mesh) -> Axis:
    """The ranks that hold the same slice of a parameter and have other gradients of it: over them gradients are
    summed."""
    return mesh.holders(param.spec.of_expert)


def make_units(
    params: Sequence[Param],
    pieces: Iterable[nn.Module],
    mesh: Mesh,
    trainable: Mapping[str, Trainable],
    tied: Iterable[str],
    zero_stage: int,
    *,
    seed: int,
    in_order: bool = False,
) -> list[Unit]:
    """Units of a rank's parameters, in the order of the parameters; those without values are drawn from `seed`. tied:
    those that other pipeline ranks hold too, which are cut alike everywhere because each is a unit. in_order: of their
    sums (Gradients)."""
    by_piece = list(pieces)
    users: dict[int, list[int]] = defaultdict(list)
    for number, piece in enumerate(by_piece):
        for tensor in piece.parameters():
            users[id(tensor)].append(number)
    together: dict[UnitKey, list[Param]] = defaultdict(list)
    for p in params:
        key = UnitKey(
            tuple(users[id(p.tensor)]),
            trainable.get(p.name),
            p.name if p.name in tied else None,
            data_axis(p, mesh),
            p.tensor.dtype,
        )
        together[key].append(p)
    storages = {p.tensor.untyped_storage()._cdata: number for number, p in reversed([*enumerate(params)])}
    units = []
    for key, members in together.items():
        cut = key.axis.size > 1 and (zero_stage >= 3 or (zero_stage >= 1 and key.trainable is not None))
        # what are neighbours in memory stay so: the same matrix of all experts (parallel/tensor/grouped.py)
        members.sort(key=lambda p: (storages[p.tensor.untyped_storage()._cdata], p.tensor.storage_offset()))
        shards = mesh.shards(members[0].spec.of_expert) if cut else SINGLE
        flat = Flat(tuple(members), shards)
        if not cut:
            initialize_missing(members, seed)
        weights = Weights(flat, keep_whole=zero_stage < 3, seed=seed) if cut else None
        used_by = tuple(by_piece[number] for number in key.pieces)
        replicas = mesh.replica if cut else SINGLE
        gradients = Gradients(flat, key.axis, replicas, in_order=in_order)
        units.append(Unit(flat, used_by, key.trainable, gradients, weights))
    return units
