"""Speed of a cluster as a plan needs it, taken from what `roots doctor --json` measured there.

cluster_profile.py: Profile --cluster_speed_of--> ClusterSpeed --predict.py--> seconds
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from roots_dist.cluster_profile import Profile, hosts_of
from roots_dist.errors import DataError

OPERATIONS = 2000


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link between the ranks of a group: `latency_s` per message, and a ring at `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, operation: str, size: int, ranks: int) -> float:
        return self.latency_s + ring_bytes(operation, size, ranks) / self.bytes_per_s


def ring_bytes(operation: str, size: int, ranks: int) -> float:
    """Bytes that one rank sends for a tensor of `size` bytes in a ring (Thakur et al. 2005)."""
    return size * {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(operation, (ranks - 1) / ranks)


@dataclass(frozen=True, kw_only=True)
class ClusterSpeed:
    flops_per_s: float
    """Sustained FLOP/s of the slowest rank's matrix products: the others wait for it."""
    bytes_per_s: float
    """Bytes per second of memory, read and written."""
    op_overhead_s: float
    """Seconds of the smallest operation."""
    peak_flops: float | None
    """Peak FLOP/s of one rank's device, for MFU."""
    ranks_per_host: int
    links: Mapping[tuple[str, str], Link]
    """("inside" or "between" hosts, operation) -> link."""

    def link(self, ranks: list[int], operation: str) -> Link:
        """Link of a group. Raises DataError if the profile has none."""
        where = "inside" if len({rank // self.ranks_per_host for rank in ranks}) == 1 else "between"
        for name in (operation, "all_gather", "all_reduce", "send"):
            if (where, name) in self.links:
                return self.links[where, name]
        raise DataError(
            f"--profile: expected links {where} hosts, which this layout uses, and none were measured. "
            "Fix: run roots doctor --json on "
            f"{'two hosts or more' if where == 'between' else 'two ranks of a host or more'}."
        )


def cluster_speed_of(profile: Profile, op_overhead_s: float) -> ClusterSpeed:
    """Speed from a profile. `op_overhead_s` is measured on this machine, whose CPU stands for those that feed the
    devices."""
    if not profile.speeds:
        raise DataError(
            "--profile: expected speeds of ranks, and none were measured. Fix: run roots doctor --json again."
        )
    if not profile.ranks:
        raise DataError("--profile: expected facts of ranks, and there are none. Fix: run roots doctor --json again.")
    for what, rates in (
        ("matrix products", [speed.matmul_flops for speed in profile.speeds]),
        ("copies", [speed.copy_bytes_per_s for speed in profile.speeds]),
        ("peak", [speed.peak_flops for speed in profile.speeds if speed.peak_flops is not None]),
        ("links", [value for link in profile.links for value in (link.bus_bytes_per_s, link.seconds)]),
    ):
        if bad := [rate for rate in rates if not 0 < rate < math.inf]:
            raise DataError(
                f"--profile: expected rates and seconds of {what} above 0, found {bad[0]:g}. Fix: run roots "
                "doctor --json again."
            )
    hosts = list(hosts_of(profile.ranks).values())
    peaks = [speed.peak_flops for speed in profile.speeds]
    links: dict[tuple[str, str], Link] = {}
    for where, operation in {(link.where, link.operation) for link in profile.links}:
        rows = sorted((l for l in profile.links if (l.where, l.operation) == (where, operation)), key=lambda l: l.bytes)
        links[where, operation] = Link(latency_s=rows[0].seconds, bytes_per_s=max(row.bus_bytes_per_s for row in rows))
    return ClusterSpeed(
        flops_per_s=min(speed.matmul_flops for speed in profile.speeds),
        bytes_per_s=min(speed.copy_bytes_per_s for speed in profile.speeds),
        op_overhead_s=op_overhead_s,
        peak_flops=None if None in peaks else min(peaks),  # type: ignore[type-var]
        ranks_per_host=min(map(hosts.count, hosts)),
        links=links,
    )


def measure_op_overhead() -> float:
    """Measure the seconds of a tiny operation, with its part of autograd: the best of a few rounds."""
    import torch

    best = float("inf")
    for _ in range(5):
        x = torch.ones(1, requires_grad=True)
        start = time.perf_counter()
        y = x
        for _ in range(OPERATIONS // 2):
            y = y * 1.0
        y.backward()
        best = min(best, (time.perf_counter() - start) / OPERATIONS)
    return best
