"""ZeRO-3: the weights of a piece (a Transformer block) are gathered as a whole, before its forward and its backward.

DeepSpeed gathers module by module, when a module is called. Our layers reach for their children's weights, so the unit
is the piece: DeepSpeed's "leaf module". Its hooks look for tensors in lists, tuples and dicts only and write into those
dicts; what that would break is mended here, by hooks before and after its own.
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
    """What DeepSpeed sees: lists, stages and pieces."""
    yield module
    if not _is_piece(module):
        for child in module.children():
            yield from _down_to_pieces(child)


def before_initialize(module: nn.Module) -> list[RemovableHandle]:
    """Returns the hooks, to be removed when the engine goes."""
    from deepspeed.utils import set_z3_leaf_module

    parts = list(_down_to_pieces(module))
    for part in parts:
        set_z3_leaf_module(part, _is_piece(part))
    return [part.register_forward_pre_hook(_copy_dicts) for part in parts]


def after_initialize(module: nn.Module, optimizer: Any) -> list[RemovableHandle]:
    """optimizer: DeepSpeed's, of stage 3. Returns the hooks, to be removed when the engine goes."""
    for hook in optimizer._leaf_module_hooks:  # would reduce within a backward; accumulate() reduces after the last one
        hook.remove()
    # No trace of the order of modules, and so no prefetch: each pipeline schedule, evaluation and batch ramp has its
    # own order, and the check that ranks agree on it is collective over the world, where pipeline ranks differ.
    optimizer.parameter_offload.fwd_pre_hook.remove()
    return [part.register_forward_hook(_watch_dataclasses) for part in _down_to_pieces(module)]


def forget_interrupted_forwards() -> None:
    """Recomputation stops a forward once it has what backward needs: DeepSpeed's stack of modules never sees its
    end."""
    from deepspeed.runtime.zero import parameter_offload

    del parameter_offload.FWD_MODULE_STACK[1:]


def forget_the_root() -> None:
    """Of an engine that is gone."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()


def _copy_dicts(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A caller's payload stays as it is: the gradients of its tensors are read from it later."""
    return tuple(dict(a) if isinstance(a, dict) else a for a in args)


def _watch_dataclasses(part: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    """Gather the piece's weights before the backward of tensors in dataclasses too (what was scored)."""
    return _watched(part, result) if is_dataclass(result) else result


def _watched(part: nn.Module, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        before_backward: Any = part.pre_bwd_fn  # a function of autograd that DeepSpeed hangs on the module
        return before_backward.apply(value) if value.requires_grad else value
    if isinstance(value, (tuple, list)):
        return type(value)(_watched(part, item) for item in value)
    if isinstance(value, dict):
        return {name: _watched(part, item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _watched(part, getattr(value, f.name)) for f in fields(value)})
    return value
