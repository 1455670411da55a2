"""Clock offsets between hosts, measured by a ping-pong of each host with rank 0 over the store.

    offset = (sent + received) / 2 - rank 0's time, from the fastest of several exchanges (Cristian 1989)

The error is at most half of that exchange's time. Wrong clocks falsify logs, file times, certificates and job limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from roots_dist.cluster_profile import Finding
from roots_dist.runs.doctor.host_groups import by_host

EXCHANGES = 8
MOST_APART_S = 1.0
"""Largest tolerated offset; NTP keeps clocks within milliseconds."""

Now = Callable[[], float]


def offset(store: Any, rank: int, hosts: Sequence[str], now: Now = time.time) -> float | None:
    """Seconds by which this host's clock is ahead of rank 0's; None on ranks that are not the first of their host.

    Every rank calls it, and rank 0 answers the hosts in turn. `hosts[rank]` is the host of each rank.
    """
    first = [members[0] for members in by_host(hosts)]
    if rank == 0:
        for other in first[1:]:
            for i in range(EXCHANGES):
                store.get(f"clock/ping/{other}/{i}")
                store.set(f"clock/pong/{other}/{i}", repr(now()).encode())
        return 0.0
    if rank not in first:
        return None
    tries = []
    for i in range(EXCHANGES):
        sent, start = now(), time.perf_counter()
        store.set(f"clock/ping/{rank}/{i}", b"-")
        reference = float(store.get(f"clock/pong/{rank}/{i}"))
        took = time.perf_counter() - start
        tries.append((took, sent + took / 2 - reference))
    return min(tries)[1]


def findings(offsets: Mapping[str, float]) -> Iterator[Finding]:
    """Findings for hosts whose clock differs from the median clock, so that rank 0's may be the wrong one. `offsets` is
    by host."""
    middle = sorted(offsets.values())[(len(offsets) - 1) // 2]
    for host, seconds in offsets.items():
        ahead = seconds - middle
        if abs(ahead) > MOST_APART_S:
            yield Finding(
                check="clocks",
                where=f"host {host}",
                found=f"clock {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}",
                expected=f"at most {MOST_APART_S:g} s from the others",
                fix="start the time service there (timedatectl set-ntp true)",
            )
