"""The logical shards of an exact run, and the gradients that it keeps apart until they are added in a fixed order.

    backward passes --> one gradient for each (data shard, context shard, part, use) of a parameter
                    --collect--> .grad: one tree of all

With `train.exact` all that is computed is computed on T tensor shards, C context shards of each text and D data shards,
however many ranks hold them, and sums over shards are trees (tree_sum.py). A gradient that several shards give a part
of has four levels, in this order: uses of one parameter by several pieces (a tied embedding), parts (runs of positions
for norms, heads for what heads share), context shards, data shards. What a rank does not hold of a level is added by
the ranks of its axis. A data shard's gradient joins the sum when its last backward pass has ended, so that of D of them
log2(D) sums are held; where other ranks hold uses, parts or context shards of it that are added first, at the end of
the step. Experts that are cut over ranks (parallel.ep) compute the tokens of all these ranks, and have the gradients of
the shards of all of them.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from roots_dist.world.mesh import SINGLE, Axis
from roots_dist.world.sharding import Param, ensure_grad
from roots_dist.world.tree_sum import RunningTreeSum, tree_all_reduce, tree_sum, tree_sum_of


class Key(NamedTuple):
    """Identifies one of a parameter's gradients by the numbers of its data shard and its context shard (among those of
    this rank), of its part and of its use."""

    data: int
    context: int
    part: int
    use: int


@dataclass(eq=False)
class Exact:
    """The logical shards of a run, and those of this rank. A run that is not exact has None in its place."""

    tensor: int
    """T: tensor shards of the whole model."""
    tensor_ranks: int
    data: int
    """D: data shards of the whole run."""
    data_ranks: int
    context: int = 1
    """C: context shards of each text. Shard c has chunks c and 2C-1-c of 2C (positions.py)."""
    cp: Axis = SINGLE
    """The context-parallel axis."""
    piece: str = ""
    """The piece whose forward pass is computed; the hooks of assembly/rank_model.py tell it."""
    uses: dict[nn.Parameter, tuple[str, ...]] = field(default_factory=dict)
    """All pieces of the model that use a parameter of this rank, in order, if they are several."""
    ep: Axis = SINGLE
    """The expert-parallel axis: ranks that send tokens to the experts of this one."""
    of_cut_experts: frozenset[nn.Parameter] = frozenset()
    """Parameters of experts that other ranks of ep do not hold."""
    ties: dict[str, Axis] = field(default_factory=dict)
    """The axis over the stages of one data rank that hold a parameter, for each parameter that several stages hold."""
    apart: frozenset[nn.Parameter] = frozenset()
    """Parameters of which other ranks hold a use or a part; their data shards are added at the end of a step."""
    stages: Counter[nn.Parameter] = field(default_factory=Counter)
    """Number of stages of this rank that use each parameter."""
    _kept: dict[nn.Parameter, dict[Key, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    _aside: dict[nn.Parameter, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    """Gradients that are not in .grad now, by data shard, of each parameter with one gradient per data shard."""
    _plain: dict[nn.Parameter, int] = field(default_factory=dict)
    """The data shard whose gradient is in .grad now; the first, if it is not here."""
    _passes: Counter[tuple[nn.Parameter, int]] = field(default_factory=Counter)
    """Backward passes that have ended through a parameter, of each data shard."""
    _sums: dict[nn.Parameter, RunningTreeSum] = field(default_factory=lambda: defaultdict(RunningTreeSum))
    """Sums of data shards that are complete."""
    _data: int = 0
    _per_shard: int = 1

    @property
    def shards(self) -> int:
        """Tensor shards of each rank."""
        return self.tensor // self.tensor_ranks

    @property
    def data_shards(self) -> int:
        """Data shards of each data rank."""
        return self.data // self.data_ranks

    @property
    def contexts(self) -> int:
        """Context shards of each context rank."""
        return self.context // self.cp.size

    @property
    def senders_of_text(self) -> int:
        """Ranks of ep that hold positions of the same texts."""
        return min(self.ep.size, self.cp.size)

    def texts_of(self, parameter: nn.Parameter) -> int:
        """Number of data ranks whose texts this rank computes with a parameter."""
        return self.ep.size // self.senders_of_text if parameter in self.of_cut_experts else 1

    def contexts_of(self, parameter: nn.Parameter) -> int:
        """Number of context shards of these texts that it computes with it."""
        return self.contexts * (self.senders_of_text if parameter in self.of_cut_experts else 1)

    @property
    def adds_contexts_first(self) -> bool:
        """True if context ranks sum each data shard before data shards are summed. A rank with several data shards
        needs it: they are not a subtree of what data ranks and context ranks sum together."""
        return self.cp.size > 1 and self.data_shards > 1

    def begin(self, num_microbatches: int) -> None:
        """Begin a step in which this rank has so many microbatches: those of its first data shard, of its second …"""
        self._per_shard = num_microbatches // self.data_shards
        self._data = 0
        self._kept.clear()
        self._aside.clear()
        self._plain.clear()
        self._passes.clear()
        self._sums.clear()

    def select(self, parameters: Iterable[nn.Parameter], microbatch: int) -> None:
        """Let the next backward pass through these parameters add to the gradients of this microbatch's data shard."""
        self._data = microbatch // self._per_shard
        if self.data_shards == 1:
            return
        for parameter in parameters:
            if self._plain.get(parameter, 0) != self._data:
                self._put_aside(parameter)
                parameter.grad = self._aside[parameter].pop(self._data, None)
                self._plain[parameter] = self._data

    @torch.no_grad()
    def complete(self, parameters: Iterable[nn.Parameter], microbatch: int) -> None:
        """Note that a microbatch's backward pass through these parameters has ended. If it was the last one of its data
        shard, the shard's gradient is added to those of its neighbours."""
        if self.data_shards == 1 or self.adds_contexts_first:
            return
        data = microbatch // self._per_shard
        for parameter in parameters:
            if not parameter.requires_grad or parameter in self.apart:
                continue
            self._passes[parameter, data] += 1
            if self._passes[parameter, data] == self._per_shard * self.stages[parameter]:
                if self._plain.get(parameter, 0) == data:
                    self._put_aside(parameter)
                contexts = self.contexts_of(parameter)
                shards = [data + text * self.data_shards for text in range(self.texts_of(parameter))]
                for shard, context in itertools.product(shards, range(contexts)):
                    gradient = _sum_of_parts(self._parts(parameter, shard, context))
                    if gradient is None:  # no backward pass has reached it
                        gradient = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
                    self._sums[parameter].add(shard * contexts + context, gradient)

    def _put_aside(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            assert self.contexts == 1, "a gradient of several context shards has not been kept apart"
            self._aside[parameter][self._plain.get(parameter, 0)] = parameter.grad
            parameter.grad = None

    def use_of(self, parameter: nn.Parameter) -> int | None:
        """Number of the use that the present piece makes of a parameter; None if there is only one."""
        pieces = self.uses.get(parameter)
        return None if pieces is None else pieces.index(self.piece)

    def gradient(
        self, parameter: nn.Parameter, part: int = 0, use: int | None = None, context: int = 0, sender: int = 0
    ) -> Tensor:
        """The gradient of the selected data shard to which a part or a use of a parameter is to be added. sender: the
        rank of ep whose tokens give it, and which has numbered data shard and context shard among its own."""
        found = self._kept[parameter]
        text, place = divmod(sender, self.senders_of_text)
        key = Key(text * self.data_shards + self._data, place * self.contexts + context, part, use or 0)
        if key not in found:
            found[key] = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        return found[key]

    def held_bytes(self, parameter: nn.Parameter) -> int:
        """Bytes that backward passes of one data shard have added to, of a parameter."""
        own = [] if parameter.grad is None else [parameter.grad]
        return sum(tensor.nbytes for tensor in (*own, *self._kept.get(parameter, {}).values()))

    def num_summed_over_stages(self, parameter: nn.Parameter) -> int:
        """Number of tensors of a tied parameter's shape that stages sum in a step."""
        parts = 1 + max((key.part for key in self._kept.get(parameter, {})), default=0)
        return self.data_shards * self.contexts * parts * len(self.uses[parameter])

    @torch.no_grad()
    def collect(self, params: Sequence[Param]) -> None:
        """Add up what this step has kept: afterwards each .grad is the sum over this rank's data shards, of all uses
        and all parts. Collective over tensor ranks, context ranks and each tie."""
        learned = [p for p in params if p.tensor.requires_grad]
        for p in learned:
            self._put_aside(p.tensor)
        sums = {p: self._sums[p.tensor].total() for p in learned if p.tensor in self._sums}
        others = [p for p in learned if p not in sums]
        for are_cut in (False, True):
            sums |= self._sums_of([p for p in others if (p.tensor in self.of_cut_experts) == are_cut])
        for p in learned:
            p.tensor.grad = sums.pop(p)
            if self._has_added_contexts(p.tensor) and self.cp.rank:  # a sum that the first context rank has already
                p.tensor.grad.zero_()
        self._kept.clear()
        self._sums.clear()

    def _sums_of(self, params: Sequence[Param]) -> dict[Param, Tensor]:
        """The sum of all that is kept of parameters with equally many shards. Collective as `collect`."""
        if not params:
            return {}
        first = params[0].tensor
        sums: dict[Param, list[Tensor]] = {p: [] for p in params}
        for data in range(self.texts_of(first) * self.data_shards):
            found: dict[Param, list[Tensor]] = {p: [] for p in params}
            for context in range(self.contexts_of(first)):
                for p in sorted(params, key=lambda p: p.name):
                    p.tensor.grad = self._of_shard(p, data, context, self.ties.get(p.name))
                _sum_over_tensor_ranks(params)
                for p in params:
                    found[p].append(ensure_grad(p))
                    p.tensor.grad = None
            of_texts: Sequence[Tensor] = [tree_sum(found.pop(p)) for p in params]
            if self._has_added_contexts(first):
                of_texts = self._of_whole_texts(of_texts)
            for p, gradient in zip(params, of_texts):
                sums[p].append(gradient)
        return {p: tree_sum(sums.pop(p)) for p in params}

    def _has_added_contexts(self, parameter: nn.Parameter) -> bool:
        """True if context ranks have summed, or are to sum, a parameter's gradient data shard by data shard. What has
        been sent to a cut expert comes from all of them (checks/exact.py)."""
        return self.adds_contexts_first and parameter not in self.of_cut_experts

    def _of_whole_texts(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """One data shard's gradients, of this rank's context shards -> of all of them."""
        flat = tree_all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), self.cp)
        summed = flat.split([gradient.numel() for gradient in gradients])
        return [piece.view_as(gradient) for piece, gradient in zip(summed, gradients)]

    def _of_shard(self, p: Param, data: int, context: int, tie: Axis | None) -> Tensor | None:
        """The gradient of this rank's parts, of a context shard of a data shard; None if no backward pass has reached
        the parameter."""
        parts = self._parts(p.tensor, data, context)
        return _sum_of_parts(parts if tie is None else self._of_all_stages(p, parts, tie))

    def _parts(self, parameter: nn.Parameter, data: int, context: int) -> dict[int, dict[int, Tensor]]:
        """Take what is kept of one context shard of a data shard: part -> use -> gradient."""
        kept = self._kept[parameter]
        parts: dict[int, dict[int, Tensor]] = defaultdict(dict)
        for key in sorted(k for k in kept if (k.data, k.context) == (data, context)):
            parts[key.part][key.use] = kept.pop(key)
        if data in self._aside[parameter]:  # which has but one context shard
            parts[0][0] = self._aside[parameter].pop(data)
        return parts

    def _of_all_stages(
        self, p: Param, parts: Mapping[int, Mapping[int, Tensor]], tie: Axis
    ) -> dict[int, dict[int, Tensor]]:
        """The same with the uses of the other stages. Each use is in one place of a table, so that its sum over the
        stages adds zeros to it."""
        uses = self.uses[p.tensor]
        numbers = torch.tensor([max(parts, default=0) + 1], device=p.tensor.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=tie.group)
        table = p.tensor.new_zeros(int(numbers), len(uses), *p.tensor.shape, dtype=p.tensor.grad_dtype)
        for part, by_use in parts.items():
            for use, gradient in by_use.items():
                table[part, use] = gradient
        return {part: dict(enumerate(row)) for part, row in enumerate(tie.sum_(table))}


def _sum_of_parts(parts: Mapping[int, Mapping[int, Tensor]]) -> Tensor | None:
    return tree_sum_of({part: tree_sum_of(uses) for part, uses in parts.items()}) if parts else None


def _sum_over_tensor_ranks(params: Sequence[Param]) -> None:
    """Sum the gradients that tensor ranks hold only in part, in one message: sum_partial_gradients as a tree."""
    partial = [p for p in params if p.is_summed_over_tp]
    if not partial:
        return
    places = [ensure_grad(p).new_zeros(p.spec.num_shards(p.tp), *p.tensor.shape) for p in partial]
    for place, p in zip(places, partial):
        place[p.spec.shard_index(p.tp)] += ensure_grad(p)
    flat = tree_all_reduce(torch.cat([place.flatten() for place in places]), partial[0].tp)
    for place, piece, p in zip(places, flat.split([place.numel() for place in places]), partial):
        ensure_grad(p).copy_(piece.view_as(place)[p.spec.shard_index(p.tp)])
