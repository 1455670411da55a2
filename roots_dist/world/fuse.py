"""Several operations in one kernel: functions between products and messages, compiled by torch.compile.

    assembly/fusing.py, by train.compile --> fuse --TensorParallel--> layers: turned = tp.fuse(turned)

A layer hands over a function where it needs it, and gets it back as it is (`eager`), or compiled. Such a function takes
tensors and numbers, writes to none of them, sends nothing, and asks for no gradient: the layer's own autograd.Function
is around it, and decides what is kept for backward. So tensor ranks, recomputation and weight gradients that are put
off need no special case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class Fuse(Protocol):
    def __call__(self, function: Function, /) -> Function: ...


def eager(function: Function, /) -> Function:
    """The function as it is, operation by operation."""
    return function


class Compiler:
    """Compiles a function when it is first called, and again at most once for other sizes: from then on they are
    variables of the kernel. A size of 1, another dtype and another order of dimensions are kernels of their own; torch
    goes back to single operations when a function has more than `torch._dynamo.config.recompile_limit` of them."""

    def __init__(self, backend: str | Callable[..., Any] = "inductor"):
        self.backend = backend
        self._fused: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Function, /) -> Function:
        if function not in self._fused:
            self._fused[function] = self._compiled(function)
        return self._fused[function]  # type: ignore[return-value] # a function of the same arguments

    def _compiled(self, function: Function) -> Callable[..., Any]:
        compiled = torch.compile(function, backend=self.backend)

        def fused(*args: Any) -> Any:
            # without a history, which differs between the pieces of a model, a kernel serves all of them
            return compiled(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))

        return fused
