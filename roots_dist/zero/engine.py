"""DeepSpeed's ZeRO 0 to 3 behind the seam. Forwards and backwards are ours; it reduces, shards, clips and steps.

    accumulate(): backwards fill .grad as ever; on leaving, one reduction for the whole step
    step(lr):     DeepSpeed's own

DeepSpeed averages over dp, and the seam sums. Instead of touching the gradients once more, DeepSpeed is told that the
loss was scaled by 1/dp: unscaling, norm and clipping then see the sum (exact where dp is a power of two).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.mesh import Mesh
from roots_dist.optim.groups import adamw, groups, set_rate
from roots_dist.optim.norm import clip_factor, global_norm
from roots_dist.sharding import Param, gradient_of
from roots_dist.zero import whole_pieces
from roots_dist.zero.ds_config import Grid, mark, settings
from roots_dist.zero.ds_state import CutState, FlatState, WholeState
from roots_dist.zero.seam import Update, no_gradients


class DeepSpeedEngine:
    def __init__(self, config: Config, mesh: Mesh, module: nn.Module, params: Sequence[Param]):
        if not dist.is_initialized():
            fix = "start the run with a launcher, or set advanced.engine to auto"
            raise ConfigError([Problem(key="advanced.engine", found="deepspeed", expected="a process group", fix=fix)])
        self.module, self.config, self.mesh, self.params = module, config, mesh, list(params)
        self.stage = config.parallel.zero
        self.by_name = {p.name: p for p in params}
        mark(params, mesh.model)
        self.optimizer = adamw(groups(params, [p.tensor for p in params], config.optim), config.optim)
        with _quiet():
            self.engine = self._initialize()
        self.zero = self.engine.optimizer
        self.state: WholeState | FlatState | CutState
        if self.stage == 0:
            self.state = WholeState(self.optimizer, params)
            return
        self.zero.override_loss_scale(1 / mesh.dp.size)
        if self.stage == 3:
            whole_pieces.after_initialize(module, self.zero)
            self.state = CutState(self.zero, mesh.dp)
        else:
            self.state = FlatState(self.zero)

    def _initialize(self) -> Any:
        import deepspeed

        if self.mesh.device.type == "cpu":  # else an op that only inference uses is compiled for a minute
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        if self.stage == 3:
            whole_pieces.before_initialize(self.module)
        engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            config=settings(self.config, sum(p.tensor.numel() for p in self.params)),
            mpu=Grid(self.mesh),
            dist_init_required=False,
        )
        return engine

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
        for p in self.params:
            gradient_of(p)

    def step(self, lr: float) -> Update:
        set_rate(self.optimizer, lr)
        if self.stage == 0:
            norm = self._clip()
            if math.isfinite(norm):
                self.engine.step()
        else:
            self.engine.step()  # a norm that is not finite: touches nothing
            norm = float(self.engine.get_global_grad_norm())
        self.discard()
        return Update(norm)

    @torch.no_grad()
    def _clip(self) -> float:
        """Stage 0 knows no model parallelism: the norm over all ranks is ours, and so is the sum over dp."""
        gradients = [p.tensor.grad for p in self.params]
        dp = self.mesh.dp.size
        norm = dp * global_norm(zip(self.params, gradients), [self.mesh.model], self.mesh.device)
        torch._foreach_mul_(gradients, dp * clip_factor(norm, self.config.optim.clip))
        return norm

    def discard(self) -> None:
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

    def finish_loading(self, step: int) -> None:
        self.state.finish(step)


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
