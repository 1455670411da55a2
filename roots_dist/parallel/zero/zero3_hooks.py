"""Hooks for ZeRO-3: the weights of a piece (a Transformer block) are gathered together, before its forward and
backward.

DeepSpeed gathers the weights of a module when the module is called. Our layers use their children's weights directly,
so the unit is the piece: a "leaf module" in DeepSpeed. DeepSpeed's hooks look for tensors only in lists, tuples and
dicts, and modify those dicts; the hooks here, before and after DeepSpeed's, make up for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from roots_dist.parallel.pipeline.stage import Stage


def _is_piece(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, Stage))


def _down_to_pieces(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that DeepSpeed sees: lists, stages and pieces."""
    yield module
    if not _is_piece(module):
        for child in module.children():
            yield from _down_to_pieces(child)


def before_initialize(module: nn.Module) -> list[RemovableHandle]:
    """Mark the pieces as leaf modules. Returns hooks, to be removed with the engine."""
    from deepspeed.utils import set_z3_leaf_module

    parts = list(_down_to_pieces(module))
    for part in parts:
        set_z3_leaf_module(part, _is_piece(part))
    return [part.register_forward_pre_hook(_copy_dicts) for part in parts]


def after_initialize(module: nn.Module, optimizer: Any) -> list[RemovableHandle]:
    """Replace DeepSpeed's hooks where they do not fit. optimizer: DeepSpeed's of stage 3. Returns hooks, to be removed
    with the engine."""
    for hook in optimizer._leaf_module_hooks:  # they reduce within backward; accumulate() reduces after the last one
        hook.remove()
    # No trace of the module order, hence no prefetch: each pipeline schedule, evaluation and batch ramp has its own
    # order, and DeepSpeed's check that ranks agree on it is collective over the world, where pipeline ranks differ.
    optimizer.parameter_offload.fwd_pre_hook.remove()
    return [part.register_forward_hook(_hook_dataclasses) for part in _down_to_pieces(module)]


def clear_interrupted_forwards() -> None:
    """Clear interrupted forwards from DeepSpeed's module stack: recomputation stops a forward once it has what backward
    needs."""
    from deepspeed.runtime.zero import parameter_offload

    del parameter_offload.FWD_MODULE_STACK[1:]


def clear_module_stack() -> None:
    """Clear the module stack after an engine was destroyed."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()


def _copy_dicts(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the caller's payload, so that the gradients of its tensors can be read later."""
    return tuple(dict(a) if isinstance(a, dict) else a for a in args)


def _hook_dataclasses(part: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    """Gather the piece's weights before the backward pass of tensors in dataclasses too (terms of the loss)."""
    return _with_backward_hook(part, result) if is_dataclass(result) else result


def _with_backward_hook(part: nn.Module, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        before_backward: Any = part.pre_bwd_fn  # a function of autograd that DeepSpeed hangs on the module
        return before_backward.apply(value) if value.requires_grad else value
    if isinstance(value, (tuple, list)):
        return type(value)(_with_backward_hook(part, item) for item in value)
    if isinstance(value, dict):
        return {name: _with_backward_hook(part, item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _with_backward_hook(part, getattr(value, f.name)) for f in fields(value)})
    return value
