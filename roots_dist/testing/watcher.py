"""Count what a GPU would do in a `with` block, without one: kernels, bytes, waits of the host.

    with Watcher() as watcher:          # tensors of any device; on the meta device they have only shapes
        forward, backward, step
    watcher.launches, watcher.bytes, watcher.waits

Each operation that writes memory is one launch that reads its inputs and writes its outputs once: views and
uninitialized memory cost nothing. A wait is an operation whose result the host must have before it can go on: a number
that is read, or a result whose size depends on values. On a CPU these cost nothing, on a GPU each empties the queue.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from roots_dist.world.fuse import Function

FREE = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "detach", "lift_fresh", "alias"}
"""Operations that launch nothing although they return a new tensor."""
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave.Tensor",
    "equal",
}
"""Operations whose result the host must know."""
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_", "_unsafe_index"}
"""Operations that first wait for the number of positions, if their index is a mask."""
PACKAGE = Path(__file__).parents[1].name


class Watcher(TorchDispatchMode):
    """A torch mode that counts. It sees no tolist() on a CPU: `reads_counted` does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's has no types
        self.launches: Counter[str] = Counter()
        """Number of launches of each operation."""
        self.bytes: Counter[str] = Counter()
        """Bytes that the launches of each operation read and write."""
        self.waits: Counter[str] = Counter()
        """Number of waits by the line of this package, or of DeepSpeed, that caused them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        if {name, f"{name}.{func._overloadname}"} & WAITS or (
            name in INDEXED and any(t.dtype == torch.bool for t in _tensors(args[1]))
        ):
            self.waits[f"{name} in {_caller()}"] += 1
        out = func(*args, **(kwargs or {}))
        returned = _tensors(out)
        before = {_storage(tensor) for tensor in given}
        makes = any(_storage(tensor) not in before for tensor in returned)
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if (makes or writes) and name not in FREE:
            self.launches[name] += 1
            self.bytes[name] += sum(t.nbytes for t in {id(t): t for t in [*given, *returned]}.values())
        return out

    def reset(self) -> None:
        """Forget what was counted."""
        for counter in (self.launches, self.bytes, self.waits):
            counter.clear()


def in_one_launch(function: Function, /) -> Function:
    """Stands for a compiler (world/fuse.py): a Watcher counts the function as one launch, which reads what it is given
    and writes what it returns once."""

    def fused(*args: Any) -> Any:
        with Watcher() as inside:
            out = function(*args)
        once = {id(tensor): tensor.nbytes for tensor in _tensors((args, out))}
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Watcher):
                mode.launches = mode.launches - inside.launches + Counter({function.__name__: 1})
                mode.bytes = mode.bytes - inside.bytes + Counter({function.__name__: sum(once.values())})
        return out

    return cast("Function", fused)


@contextmanager
def reads_counted(watcher: Watcher) -> Iterator[None]:
    """Count tolist() as a wait too while the body runs: torch does not dispatch it on a CPU."""
    real = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        watcher.waits[f"tolist in {_caller()}"] += 1
        return real(self)

    with mock.patch.object(Tensor, "tolist", tolist):
        yield


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Make attention and RMSNorm one operation each while the body runs, as on a GPU, where the meta device and a CPU
    take several.

    Results are wrong (RMSNorm is counted as LayerNorm), and a learned bias gets no gradient.
    """

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        mask = None if attn_mask is None else attn_mask.detach()
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )[0]
        return out

    def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return F.layer_norm(x, shape, weight, None, eps or 0.0)  # the same reads and writes, in one operation each way

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "rms_norm", rms_norm),
    ):
        yield


def in_words(counted: Mapping[str, int]) -> str:
    """The entries, largest first: `mul 12, add 8, …`."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counted.items(), key=lambda item: -item[1]))


def _caller() -> str:
    """The line of this package, or of DeepSpeed, that is nearest to the operation."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        for package in (PACKAGE, "deepspeed"):
            if package in parts and frame.filename != __file__:
                inside = "/".join(parts[len(parts) - parts[::-1].index(package) :])
                return f"{inside}:{frame.lineno} {frame.line}"
    return "?"


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
