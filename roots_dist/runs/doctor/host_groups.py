"""Groups of ranks by host, and tensor groups that span several hosts.

Pure arithmetic over host names; links.py makes live groups of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from roots_dist.cluster_profile import Finding, format_ranks
from roots_dist.layout import Layout

MOST_SHOWN = 4
"""Largest number of findings: a wrong order of ranks splits hundreds of groups alike."""


def by_host(hosts: Sequence[str]) -> list[list[int]]:
    """Ranks of each host, in order of their first ranks. `hosts[rank]` is the host of each rank."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def across_hosts(hosts: Sequence[str]) -> list[list[int]]:
    """Groups across hosts: the first rank of every host, the second of every host that has one, and so on. They use the
    network at once, as data and pipeline ranks do."""
    ranks = by_host(hosts)
    return [[members[i] for members in ranks if i < len(members)] for i in range(max(map(len, ranks)))]


def crossings(layout: Layout, hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Findings for tensor groups that span hosts: they communicate in every layer and need the links within a host."""
    cut = [ranks for ranks in layout.groups("tp") if len({hosts[rank] for rank in ranks}) > 1]
    for ranks in cut[:MOST_SHOWN]:
        others = f", one of {len(cut)} such groups" if len(cut) > MOST_SHOWN else ""
        yield Finding(
            check="placement",
            where=format_ranks(ranks, hosts),
            found=f"a tensor group of {layout} across hosts{others}",
            expected=f"its {layout.tp} ranks on one host",
            fix=(
                f"start a multiple of {layout.tp} ranks on every host, numbered consecutively per host, "
                "or lower parallel.tp"
            ),
        )
