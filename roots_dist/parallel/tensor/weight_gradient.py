"""Gradients of a linear layer's weights: at once, added to those of earlier microbatches, or put off.

    grad_out [B, S, F], x [B, S, D] --weight_gradient--> grad_outᵀ x [F, D], added to .grad or given to autograd

B sequences, S positions, D width in, F features out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.exact import Shard, aligned
from roots_dist.world.sharding import ensure_grad_of


def weight_gradient(tp: TensorParallel, weight: nn.Parameter | Shard, grad_out: Tensor, x: Tensor) -> Tensor | None:
    """grad_outᵀ x, [out, in], for autograd; or None if it is added to .grad here, because a microbatch before has made
    that, or because it is wider than the product's factors, or later, because weight gradients are deferred. An exact
    run always adds it, so that it is rounded alike.

    weight: the parameter itself or a shard of it, not the tensor that autograd saved, which is another one under
    recomputation.
    """
    grad_out, x = grad_out.flatten(0, -2), x.flatten(0, -2)
    is_plain = isinstance(weight, nn.Parameter) and tp.exact is None and weight.grad_dtype == grad_out.dtype
    if is_plain and not tp.deferred.enabled and weight.grad is None:
        return grad_out.t() @ x

    def add() -> None:
        grad = weight.grad
        if grad is None:  # or no more: an engine hands gradients on piece by piece. If deferred, the weight may be gone
            assert isinstance(weight, nn.Parameter), "a shard's gradient is always there"
            grad = ensure_grad_of(weight, (grad_out.shape[1], x.shape[1]))
        (add_product_to_part_ if isinstance(weight, Shard) else add_product_)(grad, grad_out.t(), x)

    if tp.deferred.enabled:
        tp.deferred.defer(add)
    else:
        add()
    return None


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in place. If out is wider, a GPU adds the product before it is rounded, without a copy of it; a CPU
    has no such kernel, and rounds the product to the dtype of its factors first."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.device.type == "cpu":
        out.add_(a @ b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def add_product_to_part_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product to a part of a tensor, with the bits that a tensor of its own would have: which kernel adds it up
    follows from where rows begin in memory, and from how far apart they are."""
    own = aligned(out)
    add_product_(own, a, b)
    if own.data_ptr() != out.data_ptr():
        out.copy_(own)
