"""Record what torch's flight recorder dumps of three ranks that hang: `python -m tests.launch.record_dumps`.

Rank 1 has called one all-reduce of tp0 and two of the world, and comes to no other; ranks 0 and 2 wait for it. gloo's
dumps are those of such ranks. NCCL's are the same calls as its own recorder writes them (FlightRecorderCuda.cpp,
version 2.10 of the format): with its names and states, the moment at which a kernel was seen to begin, and the state of
its communicators.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from roots_dist.testing.world import on_world

FOLDER = Path(__file__).parents[1] / "golden" / "flight_recorder"
RANKS = 3


def hang(rank: int, size: int) -> str:
    from torch._C import _distributed_c10d as c10d

    group, x = dist.new_group([0, 1], group_desc="tp0"), torch.ones(4)
    for _ in range(2):
        dist.all_reduce(x)
    if rank < 2:
        dist.all_reduce(x, group=group)
    dist.barrier()
    first = dist.all_reduce(x, group=group, async_op=True) if rank == 0 else None
    second = dist.all_reduce(x, async_op=True) if rank == 2 else None
    time.sleep(1)
    found = c10d._dump_fr_trace_json(includeCollectives=True, onlyActive=False)
    time.sleep(1)
    if rank == 1:  # what it had not called, so that the others end
        dist.all_reduce(x, group=group)
    if first is not None:
        first.wait()
    if second is None:
        dist.all_reduce(x)
    else:
        second.wait()
    return found if isinstance(found, str) else found.decode()


def of_nccl(dump: dict[str, object]) -> dict[str, object]:
    """The same calls as NCCL's recorder writes them."""
    entries = json.loads(json.dumps(dump["entries"]).replace('"gloo:', '"nccl:'))
    for entry in entries:
        over = entry["retired"]
        created = entry["time_created_ns"]
        entry |= {"state": "completed" if over else "started", "retired": over, "timeout_ms": 600_000}
        entry |= {"time_discovered_started_ns": created + 40_000}
        entry["time_discovered_completed_ns"] = created + 90_000 if over else None
    comms = {"0x7f3a5c0012a0": {"ncclCommState": "initialized"}}
    return dump | {"entries": entries, "nccl_comm_state": comms}


if __name__ == "__main__":
    for rank, text in enumerate(on_world(RANKS, hang)):
        for library, dump in {"gloo": json.loads(text), "nccl": of_nccl(json.loads(text))}.items():
            (FOLDER / f"{library}_rank_{rank}.json").write_text(json.dumps(dump, indent=1) + "\n")
