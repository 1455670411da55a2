"""The collectives of this process, from torch's flight recorder: which one waits, and how far each group has come.

    _dump_fr_trace_json --read_dump--> Recorded: the oldest that is not finished; the last number begun, by group

The recorder is on for gloo and NCCL, costs under a microsecond an operation, and sees DeepSpeed's operations too. It is
read here, in the process that hangs, as JSON: the files that NCCL itself writes after a timeout are pickles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from roots_dist import environment
from roots_dist.world.mesh import BACKGROUND

SIZE = {"TORCH_FR_BUFFER_SIZE": "2000"}
"""Variable that gives the recorder its length, where nobody else does; to be set before the first process group."""


@dataclass(frozen=True)
class Operation:
    """A collective, or on NCCL a message, that has begun and not finished."""

    operation: str
    group: str
    """Name of the group that torch gave it, equal on all its ranks."""
    title: str
    """Purpose of the group, as `tp0`."""
    number: int
    """Place among the operations of its group: equal on all ranks that call it."""


@dataclass(frozen=True)
class Recorded:
    pending: Operation | None = None
    begun: Mapping[str, int] = field(default_factory=dict)
    """Group -> number of its last operation that this rank has begun."""
    complete: bool = True
    """True if nothing has been overwritten: a group that is not in `begun` has then begun nothing."""


def record(background: bool = False) -> Recorded:
    """Operations that this process has begun and not finished: those of its main thread, and with `background` those of
    its second one too, for which the main thread then waits."""
    return read_dumps(_dumps(only_active=False), background)


def pending(background: bool = False) -> Operation | None:
    """The oldest operation that has begun and not finished: much cheaper than `record`."""
    return read_dumps(_dumps(only_active=True), background).pending


def _dumps(only_active: bool) -> list[Mapping[str, Any]]:
    """Contents of torch's recorders. NCCL has one of its own; a torch that is built for CUDA has both, and under gloo
    NCCL's is empty. Under NCCL the other one has the second threads of the ranks, who meet over gloo."""
    from torch._C import _distributed_c10d as c10d

    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json") if nccl else ("_dump_fr_trace_json",)
    return [json.loads(getattr(c10d, name)(includeCollectives=True, onlyActive=only_active)) for name in names]


def read_dumps(dumps: Sequence[Mapping[str, Any]], background: bool = False) -> Recorded:
    """Read what several recorders of one process hold: each counts its own operations, and all have one clock."""
    found = [(_since(dump, one), one) for dump in dumps for one in [read_dump(dump, background)]]
    pending = sorted((when, number) for number, (when, one) in enumerate(found) if one.pending is not None)
    begun = {name: number for _, one in found for name, number in one.begun.items()}
    oldest = found[pending[0][1]][1].pending if pending else None
    return Recorded(oldest, begun, all(one.complete for _, one in found))


def _since(dump: Mapping[str, Any], found: Recorded) -> int:
    """The time at which the operation that waits was begun, in nanoseconds; 0 if it is not recorded."""
    if found.pending is None:
        return 0
    numbers = ("collective_seq_id", "p2p_seq_id")
    mine = [
        int(entry.get("time_created_ns", 0))
        for entry in dump.get("entries", ())
        if entry["process_group"][0] == found.pending.group
        and any(int(entry.get(number, -1)) == found.pending.number for number in numbers)
    ]
    return min(mine, default=0)


def read_dump(dump: Mapping[str, Any], background: bool = False) -> Recorded:
    """Read a dump of one recorder. Entries are in the order in which they began."""
    oldest: Operation | None = None
    begun: dict[str, int] = {}
    entries: Sequence[Mapping[str, Any]] = dump.get("entries", ())
    for entry in sorted(entries, key=lambda entry: entry.get("record_id", 0)):
        name, title = entry["process_group"]
        message = bool(entry.get("is_p2p"))
        number = int(entry["p2p_seq_id"] if message else entry["collective_seq_id"])
        if not message:
            begun[name] = max(begun.get(name, 0), number)
        is_seen = background or title != BACKGROUND
        if oldest is None and is_seen and not entry.get("retired") and entry.get("state") != "completed":
            operation = str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"])
            oldest = Operation(operation, name, "world" if title == "default_pg" else title, number)
    return Recorded(oldest, begun, complete=len(entries) < _length())


def _length() -> int:
    """Number of operations that the recorder keeps."""
    return int((SIZE | environment.all_variables())["TORCH_FR_BUFFER_SIZE"])


def members() -> dict[str, list[int]]:
    """Ranks of each group of this process, by the group's name."""
    world = dist.distributed_c10d._world
    return {name: sorted(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}
