"""Host memory in which a save's tensors stand while training goes on, kept from one save to the next.

    engine --a tensor, on its device--> HostCopies --the same memory as last time--> the thread that writes

Where memory is new, the kernel clears each page of it: three times the work of the copy itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class HostCopies:
    """The copies of one rank. One save at a time may use them: a copy is overwritten by the next of its name."""

    _kept: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def __call__(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """A copy in CPU memory, which a GPU reaches without a detour (pinned)."""
        kept = self._kept.get((kind, name))
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._kept[kind, name] = kept
        return kept.copy_(tensor)
