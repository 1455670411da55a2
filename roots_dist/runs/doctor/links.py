"""Bandwidth and latency of the collectives that training uses, within a host and between hosts, size by size.

    hosts --host_groups.py--> groups --measure, on every rank--> samples --merge, on rank 0--> Links --> findings

All groups of a kind work at once, as in training, where two ranks of a host share its network card.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from roots_dist.cluster_profile import Finding, MeasuredLink, format_ranks
from roots_dist.runs.doctor import host_groups as placement
from roots_dist.world.mesh import Axis, make_axis

SIZES = {
    ("cpu", True): (2**12, 2**20),
    ("cpu", False): (2**12, 2**18, 2**22),
    ("cuda", True): (2**12, 2**24),
    ("cuda", False): (2**12, 2**20, 2**24, 2**28),
}
"""Bytes by (device, --quick). The smallest size shows the latency, the largest the bandwidth."""
REPEATS = 5
ENOUGH_S = 0.5
"""Seconds after which no larger size is measured."""
SLOW = 2.5
"""Factor over the median at which a pair of ranks is reported."""


class Sample(NamedTuple):
    """One rank's median time of one operation at one size."""

    where: str
    operation: str
    ranks: tuple[int, ...]
    """Ranks of the group."""
    bytes: int
    seconds: float


class PreparedOperation(NamedTuple):
    ranks: tuple[int, ...]
    """Ranks that take part."""
    run: Callable[[], object]
    times: int = 1
    """Number of operations in one `run`: a send is timed as half of a round trip, by one clock."""


def axes(hosts: Sequence[str], rank: int, timeout: timedelta) -> list[Axis]:
    """The axes `inside` and `between` hosts, where they exist. Collective over the world, whose group must exist."""
    groups = {"inside": placement.by_host(hosts), "between": placement.across_hosts(hosts)}
    return [make_axis(name, ranks, rank, timeout) for name, ranks in groups.items()]


def measure(axes: Sequence[Axis], device: torch.device, quick: bool) -> list[Sample]:
    """Measure all operations. Collective over each axis in turn."""
    return [
        sample
        for axis in axes
        if axis.size > 1
        for name, prepare in OPERATIONS.items()
        for sample in _sizes(axis, name, prepare, device, SIZES[device.type, quick])
    ]


def merge(samples: Sequence[Sample]) -> list[MeasuredLink]:
    """Links from all ranks' samples, in the order of measurement."""
    rows: dict[tuple[str, str, int], dict[tuple[int, ...], float]] = {}
    for where, operation, ranks, size, seconds in samples:
        groups = rows.setdefault((where, operation, size), {})
        groups[tuple(ranks)] = max(groups.get(tuple(ranks), 0.0), seconds)  # the slowest rank of a group
    return [_link(where, operation, size, groups) for (where, operation, size), groups in rows.items()]


def findings(samples: Sequence[Sample], hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Findings for pairs of ranks whose link is far slower than others of its kind, at the largest size; needs three
    pairs to compare."""
    for where in ("inside", "between"):
        sends = [sample for sample in samples if sample.where == where and sample.operation == "send"]
        largest = max((sample.bytes for sample in sends), default=0)
        pairs: dict[tuple[int, ...], float] = {}
        for sample in sends:
            if sample.bytes == largest:
                pairs[tuple(sample.ranks)] = max(pairs.get(tuple(sample.ranks), 0.0), sample.seconds)
        middle = statistics.median(pairs.values()) if len(pairs) >= 3 else float("inf")
        for ranks, seconds in pairs.items():
            if seconds > SLOW * middle:
                yield Finding(
                    check="links",
                    where=format_ranks(ranks, hosts),
                    found=f"{largest / seconds / 1e9:.3g} GB/s from one to the other",
                    expected=f"about {largest / middle / 1e9:.3g} GB/s as between other pairs",
                    fix=(
                        "check the cards and cables of these hosts (ethtool, ibstat, nvidia-smi nvlink -s), or "
                        "leave one out"
                    ),
                    serious=False,  # one measurement on a network that others use
                )


def _link(where: str, operation: str, size: int, groups: Mapping[tuple[int, ...], float]) -> MeasuredLink:
    seconds, slowest = statistics.median_high(groups.values()), max(groups, key=groups.__getitem__)
    n = max(map(len, groups))
    return MeasuredLink(
        where=where,
        operation=operation,
        ranks=n,
        groups=len(groups),
        bytes=size,
        seconds=seconds,
        bus_bytes_per_s=size / seconds * BUS[operation](n),
        slowest_seconds=groups[slowest],
        slowest=slowest,
    )


def _sizes(
    axis: Axis,
    name: str,
    prepare: Callable[[Axis, torch.device, int], PreparedOperation],
    device: torch.device,
    sizes: Sequence[int],
) -> Iterator[Sample]:
    for size in sizes:
        ranks, run, times = prepare(axis, device, size)
        seconds = _median_seconds(axis, run, device) / times
        if ranks:
            yield Sample(axis.name, name, ranks, size, seconds)
        longest = torch.tensor([seconds], device=device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=axis.group)  # all ranks stop at the same size
        if longest.item() > ENOUGH_S:
            return


def _median_seconds(axis: Axis, run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of `run` after one warm-up that opens the connections. Ranks start each repeat together."""
    run()
    took, together = [], torch.zeros(1, device=device)
    for _ in range(REPEATS):
        axis.sum_(together)
        together.item()  # wait for the GPU
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def _all_reduce(axis: Axis, device: torch.device, size: int) -> PreparedOperation:
    tensor = torch.zeros(size // 4, device=device)
    return PreparedOperation(axis.ranks, lambda: dist.all_reduce(tensor, group=axis.group))


def _all_gather(axis: Axis, device: torch.device, size: int) -> PreparedOperation:
    part = torch.zeros(max(1, size // 4 // axis.size), device=device)
    gathered = torch.zeros(part.numel() * axis.size, device=device)
    return PreparedOperation(axis.ranks, lambda: dist.all_gather_into_tensor(gathered, part, group=axis.group))


def _send(axis: Axis, device: torch.device, size: int) -> PreparedOperation:
    """Send between neighbours in pairs, there and back, as pipeline stages do. The last of an odd number of ranks is
    idle."""
    other = axis.rank ^ 1
    if other >= axis.size:
        return PreparedOperation((), lambda: None)
    tensor, peer = torch.zeros(size // 4, device=device), axis.ranks[other]
    steps = [dist.send, dist.recv] if axis.rank < other else [dist.recv, dist.send]

    def there_and_back() -> None:
        for step in steps:
            step(tensor, peer, group=axis.group)

    return PreparedOperation(tuple(axis.ranks[i] for i in sorted((axis.rank, other))), there_and_back, times=2)


OPERATIONS = {"all_reduce": _all_reduce, "all_gather": _all_gather, "send": _send}
BUS: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}
"""Fraction of the bytes that passes a rank's link in a ring of n (Patarasuk and Yuan 2009), as nccl-tests reports
it."""
