"""ZeRO 0 to 3 in plain PyTorch, in any dtype: the meaning of the seam. engine.py is DeepSpeed; both pass one suite.

    zero 0: gradients summed over dp, every data rank updates everything (plain data parallelism)
    zero 1: each data rank keeps 1/dp of master weights and moments, and receives only that part of the gradients' sum
    zero 2: no data rank keeps whole gradients: each backward pass hands them on, piece by piece
    zero 3: nor whole weights: they are gathered piece by piece, for each forward and each backward

Shards may be cut over some neighbours of dp alone (parallel.zero_ranks: mesh.shard, and mesh.replica of equal ones).
Experts that are cut over ranks of dp (parallel.ep) have fewer ranks that hold the same: for them, dp is mesh.edp.
What is sent, and when: unit.py, piece_hooks.py. Here is the optimizer: a float32 model is its own master copy, each
rank steps what it holds, and no gradient exists between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.parallel.optim.groups import (
    Group,
    exact_update,
    freeze,
    groups_joining,
    initial_state,
    members,
    norms_by_name,
    own_update,
    update,
)
from roots_dist.parallel.optim.norm import clip_factor, exact_group_norms, group_norms, group_squares, total_norm
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero.piece_hooks import UnitHooks, stages_of
from roots_dist.parallel.zero.seam import STATE, Update, clear_gradients, master_dtype
from roots_dist.parallel.zero.unit import Unit, make_units
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param, ParamTensor, ensure_grad, sum_partial_gradients, sum_tied_gradients


@dataclass(frozen=True, eq=False)
class MasterParam:
    """A parameter, its master weight and its optimizer state on this rank."""

    param: Param
    unit: Unit
    index: int
    """Its place in the unit."""
    master: Tensor
    """The parameter itself, or a copy in master dtype; if it is cut over data ranks, the elements of this rank's part,
    flat and often none."""
    state: dict[str, Tensor]
    """The optimizer's state of the master weight."""

    @property
    def gradient(self) -> Tensor:
        """The gradient of `master`, summed over data ranks."""
        if self.unit.gradients.axis.size > 1:
            return self.unit.gradients.of(self.index)
        gradient = self.param.tensor.grad
        assert gradient is not None, f"{self.param.name} has no gradient: step() without accumulate()"
        return gradient

    def whole(self, part: Tensor, copy: bool = True) -> Tensor:
        """The weight or a moment in the parameter's shape, a copy unless not asked for. Collective over data ranks."""
        if self.unit.flat.axis.size == 1:
            return part.clone() if copy else part
        return self.unit.flat.gathered(self.index, part)

    def part(self, whole: Tensor) -> Tensor:
        """The part of a tensor in the parameter's shape that this rank holds."""
        flat = self.unit.flat
        return whole if flat.axis.size == 1 else whole.reshape(-1)[flat.span(self.index)]


class ReferenceEngine:
    """The engine protocol (seam.py) in plain PyTorch."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        module: nn.Module,
        params: Sequence[Param],
        trainable: Mapping[str, Trainable],
        ties: Mapping[str, Axis],
    ):
        self.module, self.config, self.mesh, self.trainable, self.ties = module, config, mesh, trainable, ties
        self.exact = config.train.exact is not None
        self.own_rule = config.extension.optimizers.get(config.optim.optimizer)
        self.params = {p.name: p for p in params}
        assert len(self.params) == len(params), "two parameters of one rank have the same name"
        zero, stages = config.parallel.zero_stage, list(stages_of(module))
        pieces = [piece for stage in stages for piece in stage.pieces]
        with torch.no_grad():
            self.units = make_units(
                params, pieces, mesh, trainable, ties, zero, seed=config.train.seed, in_order=self.exact
            )
        self.place = {p.name: (unit, i) for unit in self.units for i, p in enumerate(unit.flat.params)}
        self.hooks = UnitHooks(self.units, stages, zero, at_end=self.exact)
        if any(unit.gradients.axis.size > 1 for unit in self.units):
            for i, stage in enumerate(stages):
                self.hooks.bind(mesh.pp.rank + i * mesh.pp.size, stage)
        self.sharded = any(unit.flat.axis.size > 1 for unit in self.units)
        self.masters: dict[str, MasterParam] = {}
        self.groups: list[tuple[Group, list[MasterParam]]] = []
        self.optimizer_steps: dict[int, int] = {}
        self.on_gradients: Callable[[Iterable[ParamTensor]], None] | None = None
        freeze(params)
        self.unfreeze(0)

    def unfreeze(self, step: int) -> None:
        for group in groups_joining(self.trainable, 1 + max(self.optimizer_steps, default=-1), step):
            group_params = members(group, list(self.params.values()), self.trainable)
            for p in group_params:
                p.tensor.requires_grad_(True)
                unit, index = self.place[p.name]
                unit.is_trained = True
                master = self._master(p, unit, index)
                self.masters[p.name] = MasterParam(p, unit, index, master, initial_state(master))
            self.groups.append((group, [self.masters[p.name] for p in group_params]))
            self.optimizer_steps[group.trainable.from_step] = 0

    def _master(self, p: Param, unit: Unit, index: int) -> Tensor:
        """The parameter, or what this rank holds of it, itself where the model's dtype is that of masters."""
        held = p.tensor if unit.weights is None else unit.flat.of_part(index, unit.weights.part)
        dtype = master_dtype(p.tensor.dtype)
        return held if held.dtype == dtype else held.detach().to(dtype)

    @staticmethod
    def _held(p: Param, unit: Unit, index: int) -> Tensor:
        """The weight in the model's dtype: whole, or this rank's part under ZeRO 3."""
        whole = unit.weights is None or unit.weights.keep_whole
        return p.tensor.data if whole else unit.flat.of_part(index, present(unit.weights).part)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        self.hooks.start_step()
        yield
        self.hooks.finish_step()
        for unit in self.units:
            if unit.is_trained and unit.gradients.axis.size == 1:
                unit.gradients.note_norms([p.tensor.grad for p in unit.flat.params])
                for p in unit.flat.params:
                    ensure_grad(p)  # zeros if no microbatch used it: its moments decay as well
        summed = [(master_param.param, master_param.gradient) for master_param in self.masters.values()]
        if self.exact:
            summed = []  # they have been collected before data ranks summed them (world/exact.py)
        sum_tied_gradients(summed, self.ties)
        sum_partial_gradients(summed)
        if self.on_gradients is not None:
            self.on_gradients(self._summands())

    def _summands(self) -> Iterator[ParamTensor]:
        """The gradients in the shapes of the parameters, zeros where another data rank holds the sum."""
        for held in self.masters.values():
            axis, gradient = held.unit.gradients.axis, held.gradient
            if held.unit.flat.axis.size > 1:
                whole = gradient.new_zeros(held.param.spec.local_shape(held.param.tp))
                held.part(whole).copy_(gradient)
                gradient = whole
            if axis.rank > 0 and (held.unit.flat.axis.size == 1 or held.unit.gradients.replicas.rank > 0):
                gradient = torch.zeros_like(gradient)
            yield held.param, gradient

    def local_norms(self) -> list[ParamTensor]:
        return [
            (p, norm)
            for unit in self.units
            if unit.gradients.norms is not None
            for p, norm in zip(unit.flat.params, unit.gradients.norms)
        ]

    def weights(self) -> list[ParamTensor]:
        self._wait_for_weights()
        return [(p, self._held(p, *self.place[p.name])) for p in self.params.values()]

    @torch.no_grad()
    def step(self, lr: float, limit: float = math.inf, squares: Sequence[float] | None = None) -> Update:
        self._wait_for_weights()  # of a piece that this step has not used
        norms = self._norms() if squares is None else [math.sqrt(square) for square in squares]
        norm = total_norm(norms)
        is_taken = math.isfinite(norm) and norm <= limit
        if is_taken:
            factor = clip_factor(norm, self.config.optim.clip_grad)
            for held in self.masters.values():
                gradient = held.gradient.to(held.master.dtype)
                held.param.tensor.grad = None
                held.master.grad = gradient  # the master may be the parameter itself
            if factor < 1 and self.masters:
                torch._foreach_mul_([present(held.master.grad) for held in self.masters.values()], factor)
            for group, group_params in self.groups:
                mine = [held for held in group_params if held.master.numel()]
                self._take(group, lr, [held.master for held in mine], [held.state for held in mine])
            self.optimizer_steps = {
                from_step: optimizer_steps + 1 for from_step, optimizer_steps in self.optimizer_steps.items()
            }
            self._publish()
        self.zero_grad()
        return Update(norm, norms_by_name([group for group, _ in self.groups], norms) if is_taken else {})

    def _take(self, group: Group, lr: float, weights: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """The step of a group, by the rule that the config names."""
        optim = self.config.optim
        if self.own_rule is not None:
            count = 1 + self.optimizer_steps[group.trainable.from_step]
            own_update(self.own_rule, optim, group, lr, count, weights, states)
        else:
            (exact_update if self.exact else update)(optim, group, lr, weights, states)

    @torch.no_grad()
    def squared_norms(self) -> Tensor | None:
        if self.exact:  # whole numbers, of which the largest has to be known first
            return None
        squares = group_squares(self._counted(), self.mesh.device)
        holders = self.mesh.replica if self.config.parallel.zero_stage >= 1 else self.mesh.edp
        is_first = holders.rank == 0
        return squares if is_first else torch.zeros_like(squares)

    def _norms(self) -> list[float]:
        """Norm of each group."""
        over_data = self.mesh.shard if self.config.parallel.zero_stage >= 1 else self.mesh.ep
        of_groups = exact_group_norms if self.exact else group_norms
        return of_groups(self._counted(), [self.mesh.model, over_data], self.mesh.device)

    def _counted(self) -> list[list[ParamTensor]]:
        """The gradients of each group, among the ranks that hold the same experts (mesh.edp) the same. Where gradients
        are whole, ranks of ep have equal ones of all but their experts: the first one counts them."""
        is_first = self.config.parallel.zero_stage >= 1 or self.mesh.ep.rank == 0
        return [
            [(held.param, held.gradient) for held in group if is_first or held.param.spec.of_expert]
            for _, group in self.groups
        ]

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the master weights to the model's, and start to gather those that are kept whole: they are waited for
        when their piece computes."""
        for held in self.masters.values():
            weights = held.unit.weights
            target = held.param.tensor if weights is None else held.unit.flat.of_part(held.index, weights.part)
            if target.dtype != held.master.dtype:
                target.copy_(held.master)
        for unit in self.units:
            if unit.weights is None or not unit.is_trained:
                continue
            if unit.weights.keep_whole:
                unit.weights.start_gather()
            else:
                unit.weights.free()

    def _wait_for_weights(self) -> None:
        for unit in self.units:
            if unit.weights is not None:
                unit.weights.wait()

    def zero_grad(self) -> None:
        clear_gradients(self.module)
        for unit in self.units:
            unit.gradients.clear()
        for master_param in self.masters.values():
            master_param.master.grad = None

    @torch.no_grad()
    def read_state(self, name: str, *, copy: bool = True) -> dict[str, Tensor]:
        if name not in self.masters:
            return {"weight": self._frozen(name)}
        held = self.masters[name]
        return {key: held.whole(part.detach(), copy) for key, part in _parts(held).items()}

    def _frozen(self, name: str) -> Tensor:
        """A copy of a weight that is not trained, in master dtype."""
        tensor, (unit, index) = self.params[name].tensor, self.place[name]
        dtype = master_dtype(tensor.dtype)
        if unit.weights is None or unit.weights.keep_whole:
            return tensor.detach().to(dtype, copy=True)
        return unit.flat.gathered(index, unit.flat.of_part(index, unit.weights.part)).to(dtype)

    @torch.no_grad()
    def write_state(self, name: str, state: dict[str, Tensor]) -> None:
        if name in self.masters:
            held = self.masters[name]
            for key, part in _parts(held).items():
                part.copy_(held.part(state[key].to(part)))
            return
        tensor, (unit, index) = self.params[name].tensor, self.place[name]
        if unit.weights is None or unit.weights.keep_whole:
            tensor.copy_(state["weight"])
        else:
            part = unit.flat.of_part(index, unit.weights.part)
            part.copy_(state["weight"].reshape(-1)[unit.flat.span(index)])

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        self.optimizer_steps = dict(optimizer_steps)
        for name, master_param in self.masters.items():
            master_param.state["step"].fill_(optimizer_steps[self.trainable[name].from_step])
        self._publish()


def _parts(master_param: MasterParam) -> dict[str, Tensor]:
    """The saved tensors of a parameter, by their names in STATE."""
    return {"weight": master_param.master, **{key: master_param.state[key] for key in STATE[1:]}}
