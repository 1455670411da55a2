"""Count what torch does inside a `with` block: live bytes, FLOPs, and bytes of memory that are touched.

    with CostCounter() as counter:      # tensors may be real, or on the meta device, where they have only shapes
        forward, backward
    counter.live, counter.peak, counter.work

A storage counts from the operation that makes it until the last tensor releases it, as in an allocator; one whose size
is changed in between (ZeRO-3 gives memory back), by its size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten


class Fused(NamedTuple):
    query: int
    """Index of the query argument; the keys come next."""
    products: int


FUSED = {  # backward computes the scores once more (Dao et al. 2022)
    ATEN._scaled_dot_product_flash_attention_for_cpu: Fused(query=0, products=2),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: Fused(query=1, products=5),
}


@dataclass
class Work:
    """Work of a device: for each operation its FLOPs of matrix products and the bytes that it touches."""

    operations: list[tuple[float, float]] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.operations)

    def seconds(self, flops_per_s: float, bytes_per_s: float, op_overhead_s: float) -> float:
        """Seconds on a device that does products or moves memory at these rates, whichever takes longer, and needs at
        least `op_overhead_s` per operation (a roofline: Williams et al. 2009)."""
        return sum(max(flops / flops_per_s, touched / bytes_per_s, op_overhead_s) for flops, touched in self.operations)


class CostCounter(TorchDispatchMode):
    """A torch mode that counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's has no types
        self.live = self.peak = 0
        """Bytes of storages that were made inside."""
        self.work = Work()
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        """Storages, and the bytes that each counts for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from hiding each operation from torch._dynamo, whose import takes longer than most plans."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        out = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.inductor.resize_storage_bytes_:
            self._resize(inputs[0].untyped_storage())
        outputs = list(_tensors(out))
        before = {_storage(tensor) for tensor in inputs}
        created = [tensor for tensor in outputs if _storage(tensor) not in before]
        self._add(created)
        if created or any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments):
            # all other operations only return views
            touched = sum(t.numel() * t.element_size() for t in [*inputs, *outputs])
            self.work.operations.append((_flops(func, args, kwargs, out), float(touched)))
        return out

    def restart_peak(self) -> None:
        self.peak = self.live

    def take(self) -> Work:
        """Work since the last call."""
        work, self.work = self.work, Work()
        return work

    def _add(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            self._known[storage] = counted = [0]
            self._resize(storage)
            weakref.finalize(storage, self._forget, counted)

    def _resize(self, storage: torch.UntypedStorage) -> None:
        counted = self._known.get(storage)
        if counted is not None:
            self.live += storage.nbytes() - counted[0]
            counted[0] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, counted: list[int]) -> None:
        self.live -= counted[0]


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of matrix products by torch's own table, which lacks attention on a CPU and in-place operations."""
    packet = func.overloadpacket
    if packet in FUSED:
        q, k = args[FUSED[packet].query].shape, args[FUSED[packet].query + 1].shape  # [B, h, Q, K], [B, g, S, K]
        return float(FUSED[packet].products * 2.0 * math.prod(q) * k[2])
    table = flop_registry.get(packet) or flop_registry.get(
        getattr(ATEN, func._schema.name.split("::")[1].rstrip("_"), None)
    )
    shapes = (value for value in args if not isinstance(value, torch.dtype))  # of addmm with an output of another dtype
    return float(table(*shapes, **kwargs, out_val=out)) if table else 0.0


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results of an operation, which come in nothing but lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors([*values.values()])


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
