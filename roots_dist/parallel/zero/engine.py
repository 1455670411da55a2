"""DeepSpeed's ZeRO 0 to 3 behind the seam. Forwards and backwards are ours; it reduces, shards, clips and steps.

    accumulate(): backwards fill .grad as ever; on leaving, one reduction for the whole step
    step(lr):     DeepSpeed's own

    reach(step):  what joins then makes a new engine of its own, which is handed the state of the one before

DeepSpeed averages over dp, and the seam sums. Instead of touching the gradients once more, DeepSpeed is told that the
loss was scaled by 1/dp: unscaling, norm and clipping then see the sum (exact where dp is a power of two).
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem, present
from roots_dist.parallel.optim.groups import Group, adamw, all_groups, by_name, freeze, members, set_rate
from roots_dist.parallel.optim.norm import clip_factor, group_norms, norm_of
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero import whole_pieces
from roots_dist.parallel.zero.ds_config import Grid, mark, settings
from roots_dist.parallel.zero.ds_state import CutState, FlatState, WholeState
from roots_dist.parallel.zero.seam import Update, no_gradients
from roots_dist.world.mesh import SINGLE, Mesh
from roots_dist.world.sharding import Param, ShardSpec, gradient_of


class DeepSpeedEngine:
    def __init__(
        self, config: Config, mesh: Mesh, module: nn.Module, params: Sequence[Param], trainable: Mapping[str, Trainable]
    ):
        if not dist.is_initialized():
            fix = "start the run with a launcher, or set advanced.engine to auto"
            raise ConfigError([Problem(key="advanced.engine", found="deepspeed", expected="a process group", fix=fix)])
        self.module, self.config, self.mesh, self.params, self.trainable = module, config, mesh, list(params), trainable
        self.stage = config.parallel.zero_stage
        self.by_name = {p.name: p for p in params}
        self.optimizer_steps: dict[int, int] = {}
        self.groups: list[tuple[Group, list[Param]]] = []
        self.engine: Any = None
        self.state: WholeState | FlatState | CutState
        freeze(params)
        self.unfreeze(0)

    def unfreeze(self, step: int) -> None:
        joining = all_groups(self.trainable, 1 + max(self.optimizer_steps, default=-1), step)
        if not joining:
            return
        for group in joining:
            found = members(group, self.params, self.trainable) or [self._placeholder()]
            for p in found:
                p.tensor.requires_grad_(True)
            self.groups.append((group, found))
            self.optimizer_steps[group.trainable.from_step] = 0
        kept = self.state.kept() if self.engine else []
        self._close()
        self._open()
        if kept:
            self.state.keep(kept)
            self.state.finish(self.optimizer_steps)

    def _placeholder(self) -> Param:
        """Stands for a group of which this rank has nothing: DeepSpeed sums the norm group by group over all ranks."""
        like = self.params[0].tensor
        tensor = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
        return Param(f"placeholder_{len(self.groups)}", tensor, ShardSpec(shape=(1,), copy_of=""), SINGLE)

    @property
    def learning(self) -> list[Param]:
        """What learns now, placeholders too."""
        return [p for _, found in self.groups for p in found]

    def _open(self) -> None:
        learning = self.learning
        root = nn.ModuleList([self.module])  # what DeepSpeed hangs on it goes when the engine goes
        for p in learning:
            if p.name not in self.by_name:
                root.register_parameter(p.name, p.tensor)
        self.optimizer = adamw(self.config.optim)
        for group, found in self.groups:
            self.optimizer.add_param_group({"params": [p.tensor for p in found], **group.options(self.config.optim)})
        mark(self.params, self.mesh.model)
        with _quiet():
            self.engine = self._initialize(root)
        self.zero = self.engine.optimizer
        if self.stage == 0:
            self.state = WholeState(self.optimizer)
            return
        self.zero.override_loss_scale(1 / self.mesh.dp.size)
        self.state = CutState(self.zero, self.mesh.dp) if self.stage == 3 else FlatState(self.zero)

    def _initialize(self, root: nn.ModuleList) -> Any:
        import deepspeed

        if self.mesh.device.type == "cpu":  # else an op that only inference uses is compiled for a minute
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        self.hooks = whole_pieces.before_initialize(root) if self.stage == 3 else []
        engine, *_ = deepspeed.initialize(
            model=root,
            optimizer=self.optimizer,
            config=settings(self.config, sum(p.tensor.numel() for p in self.learning)),
            mpu=Grid(self.mesh),
            dist_init_required=False,
        )
        if self.stage == 3:
            self.hooks += whole_pieces.after_initialize(root, engine.optimizer)
        return engine

    def _close(self) -> None:
        """Leave nothing of an engine in the module and in memory."""
        if self.engine is None:
            return
        self.engine.destroy()
        for hook in self.hooks:
            hook.remove()
        if self.stage == 3:
            whole_pieces.forget_the_root()
        self.engine = self.zero = None
        del self.state, self.optimizer
        gc.collect()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        if self.stage == 0:
            yield
            self._fill_missing()
            self.engine.allreduce_gradients(bucket_size=self.config.advanced.reduce_bucket)
            return
        with self.engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                no_gradients(self.module)  # leaving reduces what is there, and the other ranks are not coming
                raise
            self._fill_missing()
        if self.stage == 3:
            whole_pieces.forget_interrupted_forwards()

    def _fill_missing(self) -> None:
        """Parameters that no microbatch used: DeepSpeed would leave them out, or take last step's gradient."""
        for p in self.learning:
            gradient_of(p)

    def step(self, lr: float) -> Update:
        set_rate(self.optimizer, lr)
        if self.stage == 0:
            norms = self._clip()
            norm = norm_of(norms)
            if math.isfinite(norm):
                self.engine.step()
        else:
            with _overheard(self.zero) as found:
                self.engine.step()  # a norm that is not finite: touches nothing
            norm = float(self.engine.get_global_grad_norm())
            norms = self._by_group(found, norm) if math.isfinite(norm) else []
        self.zero_grad()
        if not math.isfinite(norm):
            return Update(norm, {})
        self.optimizer_steps = {border: optimizer_steps + 1 for border, optimizer_steps in self.optimizer_steps.items()}
        return Update(norm, by_name([group for group, _ in self.groups], norms))

    def _by_group(self, found: list[Tensor], norm: float) -> list[float]:
        """found: what DeepSpeed made `norm` of, in the scale of its loss and, in stage 3, in parts of groups."""
        squares = [0.0] * len(self.groups)
        for i, part in enumerate(torch.stack([part.double() for part in found]).tolist()):  # one wait for the device
            squares[self.zero.sub_group_to_group_id[i] if self.stage == 3 else i] += part * part
        scale = norm / (math.sqrt(sum(squares)) or 1.0)
        return [scale * math.sqrt(square) for square in squares]

    @torch.no_grad()
    def _clip(self) -> list[float]:
        """Stage 0 knows no model parallelism: the norms over all ranks are ours, and so is the sum over dp."""
        dp = self.mesh.dp.size
        groups = [[(p, present(p.tensor.grad)) for p in found] for _, found in self.groups]
        norms = [dp * norm for norm in group_norms(groups, [self.mesh.model], self.mesh.device)]
        factor = dp * clip_factor(norm_of(norms), self.config.optim.clip_grad)
        torch._foreach_mul_([gradient for group in groups for _, gradient in group], factor)
        return norms

    def zero_grad(self) -> None:
        no_gradients(self.module)
        if self.stage:
            self.zero.zero_grad()
        if self.stage in (1, 2):
            self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)

    def read_state(self, name: str) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.state.read(self.by_name[name])

    def write_state(self, name: str, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.state.write(self.by_name[name], state)

    def finish_loading(self, optimizer_steps: Mapping[int, int]) -> None:
        self.optimizer_steps = dict(optimizer_steps)
        self.state.finish(optimizer_steps)


@contextmanager
def _overheard(zero: Any) -> Iterator[list[Tensor]]:
    """The norms of its groups, which DeepSpeed works out for clipping and tells nobody."""
    found: list[Tensor] = []
    norm_of_group = zero.get_grad_norm_direct

    def listened(*args: Any, **kwargs: Any) -> Tensor:
        found.append(norm_of_group(*args, **kwargs))
        return found[-1]

    zero.get_grad_norm_direct = listened
    try:
        yield found
    finally:
        del zero.get_grad_norm_direct


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's start-up says what it found on this machine; its errors still come through, and torch's warnings on
    collectives that it uses are not ours to mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch\.distributed")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
