"""DeepSpeed's ZeRO stages 0 to 3 behind the seam. Forward and backward are ours; DeepSpeed reduces, shards, clips and
steps.

    accumulate():   backward passes add to .grad as usual; leaving it sums what tied and partial gradients are parts of,
                    and starts one reduction for the whole step
    step(lr):       DeepSpeed's own step
    unfreeze(step): if parameters join, create a new DeepSpeed engine and give it the state of the previous one

DeepSpeed averages over dp while the seam sums. DeepSpeed is therefore told that the loss was scaled by 1/dp: unscaling,
norm and clipping then see the sum without another pass over the gradients (exact if dp is a power of two).
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem, present
from roots_dist.parallel.optim.groups import Group, adamw, freeze, groups_joining, members, norms_by_name, set_lr
from roots_dist.parallel.optim.norm import clip_factor, group_norms, total_norm
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero import zero3_hooks
from roots_dist.parallel.zero.ds_config import Mpu, deepspeed_config, mark_counted
from roots_dist.parallel.zero.ds_state import Stage0State, Stage3State, Stage12State
from roots_dist.parallel.zero.seam import Update, clear_gradients
from roots_dist.world.mesh import SINGLE, Axis, Mesh
from roots_dist.world.sharding import (
    Param,
    ParamTensor,
    ShardSpec,
    ensure_grad,
    initialize_missing,
    sum_partial_gradients,
    sum_tied_gradients,
)


class DeepSpeedEngine:
    """The engine protocol (seam.py) on top of DeepSpeed."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        module: nn.Module,
        params: Sequence[Param],
        trainable: Mapping[str, Trainable],
        ties: Mapping[str, Axis],
    ):
        if not dist.is_initialized():
            fix = "start the run with a launcher, or set advanced.engine=reference"
            raise ConfigError([Problem(key="advanced.engine", found="deepspeed", expected="a process group", fix=fix)])
        self.module, self.config, self.mesh, self.params, self.trainable = module, config, mesh, list(params), trainable
        self.stage = config.parallel.zero_stage
        self.by_name, self.ties = {p.name: p for p in params}, ties
        self.on_gradients: Callable[[Iterable[ParamTensor]], None] | None = None
        self._norms: list[ParamTensor] = []
        self.optimizer_steps: dict[int, int] = {}
        self.groups: list[tuple[Group, list[Param]]] = []
        self.engine: Any = None
        self.state: Stage0State | Stage12State | Stage3State
        freeze(params)
        initialize_missing(params, config.train.seed)
        self.unfreeze(0)

    def unfreeze(self, step: int) -> None:
        joining = groups_joining(self.trainable, 1 + max(self.optimizer_steps, default=-1), step)
        if not joining:
            return
        for group in joining:
            found = members(group, self.params, self.trainable) or [self._placeholder()]
            for p in found:
                p.tensor.requires_grad_(True)
            self.groups.append((group, found))
            self.optimizer_steps[group.trainable.from_step] = 0
        snapshot = self.state.snapshot() if self.engine else []
        self._destroy_engine()
        self._create_engine()
        if snapshot:
            self.state.restore(snapshot)
            self.state.finish_loading(self.optimizer_steps)

    def _placeholder(self) -> Param:
        """A parameter for a group of which this rank holds nothing: DeepSpeed sums the norm group by group over all
        ranks."""
        like = self.params[0].tensor
        tensor = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
        tensor.grad_dtype = like.grad_dtype
        return Param(f"placeholder_{len(self.groups)}", tensor, ShardSpec(shape=(1,), copy_of=""), SINGLE)

    @property
    def unfrozen(self) -> list[Param]:
        """Parameters that are trained now, with placeholders."""
        return [p for _, found in self.groups for p in found]

    def _create_engine(self) -> None:
        unfrozen = self.unfrozen
        root = nn.ModuleList([self.module])  # attributes that DeepSpeed adds to it vanish with the engine
        for p in unfrozen:
            if p.name not in self.by_name:
                root.register_parameter(p.name, p.tensor)
        self.optimizer = adamw(self.config.optim)
        for group, found in self.groups:
            self.optimizer.add_param_group(
                {"params": [p.tensor for p in found], **group.adamw_options(self.config.optim)}
            )
        mark_counted(self.params, self.mesh.model)
        with _silenced():
            self.engine = self._initialize(root)
        self.zero = self.engine.optimizer
        if self.stage == 0:
            self.state = Stage0State(self.optimizer)
            return
        self.zero.override_loss_scale(1 / self.mesh.dp_cp.size)
        if self.stage < 3:  # with these dtypes in its config it would choose an optimizer that cannot defer reduction
            self.zero.dtype = self.zero.gradient_accumulation_dtype = self.unfrozen[0].tensor.grad_dtype
        self.state = Stage3State(self.zero, self.mesh.dp_cp) if self.stage == 3 else Stage12State(self.zero)

    def _initialize(self, root: nn.ModuleList) -> Any:
        import deepspeed

        if self.mesh.device.type == "cpu":  # otherwise an inference-only op is compiled for a minute
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        self.hooks = zero3_hooks.before_initialize(root) if self.stage == 3 else []
        engine, *_ = deepspeed.initialize(
            model=root,
            optimizer=self.optimizer,
            config=deepspeed_config(self.config, sum(p.tensor.numel() for p in self.unfrozen)),
            mpu=Mpu(self.mesh),
            dist_init_required=False,
        )
        if self.stage == 3:
            self.hooks += zero3_hooks.after_initialize(root, engine.optimizer)
        return engine

    def _destroy_engine(self) -> None:
        """Remove the engine from the module and from memory."""
        if self.engine is None:
            return
        self.engine.destroy()
        for hook in self.hooks:
            hook.remove()
        if self.stage == 3:
            zero3_hooks.clear_module_stack()
        self.engine = self.zero = None
        del self.state, self.optimizer
        gc.collect()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        if self.stage == 0:
            yield
            self._sum_shared()
            self.engine.allreduce_gradients(bucket_size=self.config.advanced.reduce_bucket)
            return
        with self.engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                clear_gradients(self.module)  # leaving would reduce gradients, and the other ranks do not take part
                raise
            self._sum_shared()
        if self.stage == 3:
            zero3_hooks.clear_interrupted_forwards()

    def _sum_shared(self) -> None:
        """Sum the gradients that other ranks than data ranks have parts of. Parameters that no microbatch used get
        zeros: DeepSpeed would skip them or reuse the last step's gradient.

        Those of tied parameters are summed over data ranks too. Afterwards the first data rank has the sum and the
        others have zeros, to which DeepSpeed's sum over dp adds nothing. It sums buckets, in an order that depends on a
        parameter's place in its bucket, which is another one on each stage: from three data ranks on, copies would
        drift apart by rounding. An all-reduce over all holders gives each of them the same bits.
        """
        found = [(p, ensure_grad(p)) for p in self.unfrozen]
        norms = torch._foreach_norm([gradient for _, gradient in found]) if found else ()
        self._norms = [(p, norm) for (p, _), norm in zip(found, norms)]
        sum_tied_gradients(found, self.ties)
        if self.mesh.dp_cp.rank > 0:
            for gradient in (gradient for p, gradient in found if p.name in self.ties):
                gradient.zero_()
        sum_partial_gradients(found)
        if self.on_gradients is not None:
            self.on_gradients(found)

    def local_norms(self) -> list[ParamTensor]:
        return self._norms

    def weights(self) -> list[ParamTensor]:
        return [(p, p.tensor.data) for p in self.params]

    def squared_norms(self) -> None:
        """None: DeepSpeed takes the norms in its own step."""

    def step(self, lr: float, limit: float = math.inf, squares: Sequence[float] | None = None) -> Update:
        set_lr(self.optimizer, lr)
        if self.stage == 0:
            norms = self._clip()
            norm = total_norm(norms)
            if math.isfinite(norm) and norm <= limit:
                self.engine.step()
        else:
            with _capture_group_norms(self.zero, self.mesh.dp_cp.size, limit) as found:
                self.engine.step()  # changes nothing if the norm is not finite
            # A norm above the limit is not finite to DeepSpeed. Under bf16 it looks at gradients first, and takes no
            # norm of those that are not finite: its own is inf then.
            by_us = limit < math.inf and len(found) > 0
            norm = _total(found, self.mesh.dp_cp.size) if by_us else float(self.engine.get_global_grad_norm())
            norms = self._by_group(found, norm) if math.isfinite(norm) else []
        self.zero_grad()
        if not math.isfinite(norm) or norm > limit:
            return Update(norm, {})
        self.optimizer_steps = {
            from_step: optimizer_steps + 1 for from_step, optimizer_steps in self.optimizer_steps.items()
        }
        return Update(norm, norms_by_name([group for group, _ in self.groups], norms))

    def _by_group(self, raw_norms: list[Tensor], norm: float) -> list[float]:
        """Norm of each group. raw_norms: the norms that DeepSpeed combined into `norm`, in the scale of its loss and,
        for stage 3, of parts of groups."""
        squares = [0.0] * len(self.groups)
        for i, part in enumerate(
            torch.stack([part.double() for part in raw_norms]).tolist()
        ):  # one wait for the device
            squares[self.zero.sub_group_to_group_id[i] if self.stage == 3 else i] += part * part
        scale = norm / (math.sqrt(sum(squares)) or 1.0)
        return [scale * math.sqrt(square) for square in squares]

    @torch.no_grad()
    def _clip(self) -> list[float]:
        """Clip the gradients in stage 0, where DeepSpeed knows no model parallelism: norms are computed over all ranks,
        and dp is summed."""
        dp = self.mesh.dp_cp.size
        groups = [[(p, present(p.tensor.grad)) for p in found] for _, found in self.groups]
        norms = [dp * norm for norm in group_norms(groups, [self.mesh.model], self.mesh.device)]
        factor = dp * clip_factor(total_norm(norms), self.config.optim.clip_grad)
        torch._foreach_mul_([gradient for group in groups for _, gradient in group], factor)
        return norms

    def zero_grad(self) -> None:
        clear_gradients(self.module)
        if self.stage:
            self.zero.zero_grad()
        if self.stage in (1, 2):
            self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)

    def read_state(self, name: str, *, copy: bool = True) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.state.read(self.by_name[name])

    def write_state(self, name: str, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.state.write(self.by_name[name], state)

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        self.optimizer_steps = dict(optimizer_steps)
        self.state.finish_loading(optimizer_steps)


def _total(raw_norms: Sequence[Tensor], dp: int) -> float:
    """Norm of the whole model from those of DeepSpeed's groups, in the scale of its loss; inf if one of them is not
    finite, for which DeepSpeed says -1."""
    parts = torch.stack([part.double() for part in raw_norms]).tolist()  # one wait for the device
    return dp * math.hypot(*parts) if all(0 <= part < math.inf for part in parts) else math.inf


@contextmanager
def _capture_group_norms(zero: Any, dp: int, limit: float) -> Iterator[list[Tensor]]:
    """Collect the norms of the groups, which DeepSpeed computes for clipping but does not return. If all together are
    above `limit`, it is told that the last is not finite, so that it takes no step."""
    found: list[Tensor] = []
    norm_of_group = zero.get_grad_norm_direct
    count = len(zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.fp16_groups)

    def captured(*args: Any, **kwargs: Any) -> Tensor:
        found.append(norm_of_group(*args, **kwargs))
        is_above = limit < math.inf and len(found) == count and _total(found, dp) > limit
        return torch.full_like(found[-1], math.inf) if is_above else found[-1]

    zero.get_grad_norm_direct = captured
    try:
        yield found
    finally:
        del zero.get_grad_norm_direct


@contextmanager
def _silenced() -> Iterator[None]:
    """Silence DeepSpeed's start-up messages and torch's warnings about collectives that DeepSpeed uses; errors still
    appear."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch\.distributed")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
