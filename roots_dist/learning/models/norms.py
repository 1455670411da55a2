"""Norms and dropout, which lie outside the tensor-parallel regions and see all channels of this rank's positions.

B sequences, s positions of this rank, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.parallel.tensor.by_positions import ALL, ByRow, Runs, by_positions
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch
from roots_dist.world.fuse import Fuse, eager
from roots_dist.world.positions import Positions
from roots_dist.world.sharding import ShardSpec, declare


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool = False, fuse: Fuse = eager) -> Tensor:
    """RMSNorm over the last dimension, times the weight; or times 1 + weight (zero_centered), in float32 or wider, in
    which the sum does not lose what the weight has learned."""
    if weight is None or not zero_centered:
        return _rms_norm(x, weight, eps, fuse)
    exact = torch.promote_types(x.dtype, torch.float32)
    return _rms_norm(x.to(exact), 1 + weight.to(exact), eps, fuse).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, fuse: Fuse) -> Tensor:
    if weight is not None and _has_own(x):
        out: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call] # torch types no apply
            x, weight, eps, fuse(_rms), fuse(_rms_backward_of_all)
        )
        return out
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _has_own(x: Tensor) -> bool:
    """True if our RMSNorm replaces torch's for x: on a CPU, where torch has no kernel for it, ours takes a third of the
    passes over memory. It keeps no tensor of x's size except x."""
    return x.dtype in (torch.float32, torch.float64) and rng.kernels_of(x.device) is None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> Tensor:
        normed, inverse = forward(x, weight, eps)
        ctx.save_for_backward(x, inverse, weight)
        ctx.kernel = backward
        out: Tensor = normed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernel(grad, *ctx.saved_tensors), None, None, None


def _rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    normed, inverse = _rms(x, weight, eps)
    return normed, x, inverse


def _rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    inverse = (squares / x.shape[-1] + eps).rsqrt()
    normed: Tensor = x * inverse
    return normed.mul_(weight), inverse


def _rms_backward(
    runs: Runs, grad: Tensor, kept: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> tuple[Tensor, list[list[Tensor]]]:
    (x, inverse), weight = kept, present(vectors[0])
    normed = x * inverse
    of_runs = runs.cut(grad * normed)
    grad_weights = [run.flatten(0, -2).sum(0) for run in runs.own_of(of_runs)]
    products = [run @ weight for run in of_runs]  # a product of fewer rows may add in another order
    product = products[0] if len(products) == 1 else torch.cat(products, 1)
    along = product.unsqueeze(-1) / x.shape[-1]  # of the gradient, along x
    grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(inverse)
    return grad_x, [grad_weights]


def _rms_backward_of_all(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, ((grad_weight,),) = _rms_backward(ALL, grad, (x, inverse), (weight,))
    return grad_x, grad_weight


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    out, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return out, x, mean, inverse


def _layer_norm_backward(
    runs: Runs, grad: Tensor, kept: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> tuple[Tensor, list[list[Tensor]]]:
    (x, mean, inverse), (weight, bias) = kept, vectors
    derive, shape = torch.ops.aten.native_layer_norm_backward, x.shape[-1:]
    grad_x = derive(grad, x, shape, mean, inverse, weight, bias, [True, False, False])[0]
    if weight is None:
        return grad_x, []
    wanted = [False, True, bias is not None]
    cut = map(runs.cut_own, (grad, x, mean, inverse))
    of_runs = [derive(g, x, shape, m, i, weight, bias, wanted)[1:] for g, x, m, i in zip(*cut)]
    return grad_x, [list(of_vector) for of_vector in zip(*of_runs)]


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019). Its gradient is partial under sequence
    parallelism, and in an exact run."""

    def __init__(
        self,
        config: Config,
        tp: TensorParallel,
        width: int | None = None,
        copy_of: str | None = None,
        eps: float | None = None,
    ):
        """width: by default that of the stack. copy_of: global name of the norm that this one copies. eps: by default
        advanced.norm_eps."""
        super().__init__()
        m = config.model
        self.tp = tp
        eps = config.advanced.norm_eps if eps is None else eps
        self.rms = m.norm == "rmsnorm"
        if self.rms:
            self.plain: Callable[..., Tensor] = partial(
                rms_norm, eps=eps, zero_centered=m.zero_centered_norm, fuse=tp.fuse
            )
            self.by_row = ByRow(self.plain, partial(_rms_forward, eps=eps), _rms_backward)
        else:
            self.plain = partial(_layer_norm, eps=eps)
            self.by_row = ByRow(self.plain, partial(_layer_norm_forward, eps=eps), _layer_norm_backward)
        self.has_own = m.norm_affine and not m.zero_centered_norm  # RMSNorm of ours has a weight, as it is

        def vector(name: str, fill: float) -> nn.Parameter:
            original = f"{copy_of}.{name}" if copy_of else None
            shape = (width or config.model.hidden,)
            spec = ShardSpec(shape=shape, fill=fill, partial=tp.has_partial_gradients, copy_of=original)
            return declare(self, name, spec, tp.axis)

        self.weight = vector("weight", 0.0 if m.zero_centered_norm else 1.0) if m.norm_affine else None
        self.bias = vector("bias", 0.0) if m.norm_affine and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.rms:
            return by_positions(self.tp, self.by_row, x, self.weight, self.bias)
        return by_positions(self.tp, self.by_row if self.has_own and _has_own(x) else self.plain, x, self.weight)


class Dropout(nn.Module):
    """Inverted dropout whose mask depends on (seed, step, site, sample, position, channel) and on no layout."""

    def __init__(self, config: Config, tp: TensorParallel, site: str):
        super().__init__()
        self.drop, self.seed, self.tp, self.site = config.model.dropout, config.train.seed, tp, site

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """[B, s, D] -> [B, s, D]"""
        if not self.training or self.drop == 0:
            return x
        mine = self.tp.held_positions(x.shape[1])
        rows = mask_rows(self.seed, self.site, batch, mine, x.device)
        return rng.dropout(x, self.drop, rows, fuse=self.tp.fuse)


def mask_rows(seed: int, site: str, batch: MicroBatch, positions: Positions, device: torch.device) -> Tensor:
    """int64 [B, s]: key of each row of a dropout mask."""
    samples = rng.fold(rng.key("dropout", seed, batch.step, site), batch.sample_ids)  # [B]
    return rng.fold(samples.unsqueeze(1), positions.places(device))
